"""What MLflow runs to load a registered bundle; no pickle."""

from mlflow.models import set_model

from fraud_pkg.model.mlflow_model import BundleModel

set_model(BundleModel())
