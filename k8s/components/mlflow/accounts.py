"""The accounts of the Secret, before the server starts: `admin` for people who give others theirs, `jobs` for the jobs,
which owns what it registers and nothing else. Another password in the Secret is another password here.
"""

import os

from mlflow.server.auth.config import read_auth_config
from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

store = SqlAlchemyStore()
store.init_db(read_auth_config().database_uri)
for name in ("admin", "jobs"):
    password, rights = os.environ[f"PASSWORD_{name.upper()}"], {"is_admin": name == "admin"}
    if store.has_user(name):
        store.update_user(name, password, **rights)
    else:
        store.create_user(name, password, **rights)
