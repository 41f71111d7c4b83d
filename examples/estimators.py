"""Reduce images by the estimators of nyscaled.sklearn, inside scikit-learn's pipelines."""

# region svd
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

import nyscaled as nys

images, labels = load_digits(return_X_y=True)
svd = nys.sklearn.TruncatedSVD(n_components=None, tol=0.3, random_state=0)  # at most 30 % is lost
classifier = make_pipeline(svd, LogisticRegression(max_iter=1000)).fit(images / 16, labels)
print(len(svd.components_), round(classifier.score(images / 16, labels), 2))
# endregion svd

# region nystroem
features = nys.sklearn.Nystroem("rbf", gamma=0.05, n_components=100, random_state=0)
classifier = make_pipeline(features, LogisticRegression(max_iter=1000)).fit(images / 16, labels)
print(round(features.relative_error_, 3), round(classifier.score(images / 16, labels), 2))
# endregion nystroem
