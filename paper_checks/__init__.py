"""Every numbered statement of the paper as a claim that runs, with a control that must fail.

Li, Zhang, Mokhtari, He, On the Crucial Role of Initialization for Matrix Factorization, ICLR 2025.
`python -m paper_checks` runs all of them; `REPORT.md` is what they measured.
"""

import os

from .compiler import FLAGS

# Hundreds of programs run once each: compiling them is most of the time. No result depends on these
# flags; those that are set already stay.
os.environ.setdefault("XLA_FLAGS", FLAGS)
# Two workers with two BLAS threads each wait for one another most of the time.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
