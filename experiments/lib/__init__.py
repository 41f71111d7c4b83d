"""What the scripts share: options, records, style, sweeps, and the methods of several figures."""
