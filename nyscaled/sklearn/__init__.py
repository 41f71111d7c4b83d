"""Estimators with the interfaces of scikit-learn; they need the extra `sklearn`."""

from nyscaled.sklearn.nystroem import Nystroem
from nyscaled.sklearn.truncated_svd import TruncatedSVD

__all__ = ["Nystroem", "TruncatedSVD"]
