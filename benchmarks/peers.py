"""The peers that a deployment would have instead: a scikit-learn pipeline, and an answer that never changes, which is
the floor.

As HTTP endpoints (`python benchmarks/peers.py constant|typed|sklearn PORT [MODEL]`) and as Lambda handlers
(`peers.constant`, `peers.pipeline`).
"""

import json
import os
import sys
import time
from functools import cache

COLUMNS = ("type", "amount", "sender_balance", "receiver_balance", "hour")
CONSTANT = {
    "transaction_id": "a-1001",
    "fraud_probability": 0.001234567,
    "decision": "allow",
    "costs": {"allow": 1.88, "review": 5.19, "block": 50.35},
    "prices": {"review": 30.0, "block": 0.0},
    "limit": None,
    "rule": None,
    "control": None,
    "reasons": [],
    "history": True,
    "known_entities": 2,
    "model": "0123456789ab",
}


def columns(transaction: dict) -> dict:
    """The columns of a transaction that the pipeline learns from."""
    return {name: transaction["time"] // 3600 % 24 if name == "hour" else transaction[name] for name in COLUMNS}


def train(transactions: list[dict], frauds: list[int], trees: int, place: str) -> None:
    """The pipeline as the tutorials have it, on the columns of the transaction alone, kept as they keep it."""
    import joblib
    import pandas as pd
    from sklearn.compose import ColumnTransformer
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    encoded = ColumnTransformer(
        [
            ("type", OneHotEncoder(handle_unknown="ignore", sparse_output=False), ["type"]),
            ("numbers", StandardScaler(), list(COLUMNS[1:])),
        ]
    )
    model = make_pipeline(encoded, HistGradientBoostingClassifier(max_iter=trees, early_stopping=False, random_state=7))
    joblib.dump(model.fit(pd.DataFrame(map(columns, transactions)), frauds), place)


@cache
def scorer(place: str):
    """Transaction -> answer, with the trained pipeline on a data frame of one row."""
    import joblib
    import pandas as pd

    model = joblib.load(place)

    def answer(transaction: dict) -> dict:
        p = float(model.predict_proba(pd.DataFrame([columns(transaction)]))[0, 1])
        return {
            "transaction_id": transaction["transaction_id"],
            "fraud_probability": p,
            "decision": "block" if p >= 0.5 else "allow",
        }

    return answer


def endpoint(kind: str, place: str):
    """A FastAPI application with one route."""
    from fastapi import FastAPI

    from fraud_pkg.core.record import DecisionResponse
    from fraud_pkg.serve.wire import TransactionRequest

    app = FastAPI()
    if kind == "constant":

        @app.post("/predict")
        async def predict() -> dict:
            return CONSTANT
    elif kind == "typed":

        @app.post("/predict")
        async def predict(transaction: TransactionRequest) -> DecisionResponse:
            return CONSTANT
    else:
        answer = scorer(place)

        @app.post("/predict")
        async def predict(transaction: dict) -> dict:
            return answer(transaction)

    return app


def reply(content: dict) -> dict:
    """What API Gateway takes from a function."""
    return {
        "statusCode": 200,
        "headers": {"Content-Type": "application/json"},
        "multiValueHeaders": {},
        "body": json.dumps(content),
    }


def constant(event: dict, context) -> dict:
    """Lambda: the floor."""
    return reply(CONSTANT)


def pipeline(event: dict, context) -> dict:
    """Lambda: the pipeline."""
    return reply(scorer(os.environ["PEER_MODEL"])(json.loads(event["body"])))


def timed(event: dict, context) -> dict:
    """Lambda: the handler of inner.py, with the nanoseconds that it took as a header."""
    from inner import app

    began = time.perf_counter_ns()
    answer = app(event, context)
    answer["headers"]["Nanoseconds"] = str(time.perf_counter_ns() - began)
    return answer


if __name__ == "__main__":
    import uvicorn

    kind, port, *place = sys.argv[1:]
    uvicorn.run(
        endpoint(kind, *place or [""]),
        host="127.0.0.1",
        port=int(port),
        http="httptools",
        loop="uvloop",
        access_log=False,
        log_config=None,
        server_header=False,
    )
