"""Every numbered statement of the paper as a claim that runs, with a control that must fail.

Li, Zhang, Mokhtari, He, On the Crucial Role of Initialization for Matrix Factorization, ICLR 2025.
`python -m paper_checks` runs all of them; `REPORT.md` is what they measured.
"""

import os

# Hundreds of small programs run once each: compiling them is nearly all of the time, and the first
# level of optimization halves it. No result depends on it; flags that are set already stay.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")
