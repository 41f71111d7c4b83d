"""The figures and tables: one script each, and `lib` with what the scripts share."""
