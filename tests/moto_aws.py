"""moto's server, closer to AWS in four places.

Chalice sends Swagger 2.0; moto's API Gateway takes OpenAPI 3 only, and reads from both what they have in common.
DynamoDB's transactions are serialisable; moto runs them in the threads of its web server without a lock.
A transaction that a client sends again with the same token, because the answer was lost, is done once; moto does it
again.
The cost of a transaction does not grow with the table; moto copies the whole table to undo one.
"""

import copy
import sys
import threading
from types import SimpleNamespace

from moto.apigateway.models import APIGatewayBackend
from moto.dynamodb import models as dynamodb
from moto.dynamodb.models import DynamoDBBackend
from moto.dynamodb.models.dynamo_type import DynamoType
from moto.dynamodb.models.table import Table
from moto.dynamodb.responses import DynamoHandler
from moto.server import main


def relabelled(document: dict) -> dict:
    document = {**document, "info": {"description": "", **document.get("info", {})}}
    if document.pop("swagger", None):
        document["openapi"] = "3.0.1"
    return document


imported, replaced = APIGatewayBackend.import_rest_api, APIGatewayBackend.put_rest_api


def import_rest_api(self, api_doc, fail_on_warnings):
    return imported(self, relabelled(api_doc), False)


def put_rest_api(self, function_id, api_doc, fail_on_warnings=False, mode="merge"):
    return replaced(self, function_id, relabelled(api_doc), False, mode=mode)


APIGatewayBackend.import_rest_api, APIGatewayBackend.put_rest_api = import_rest_api, put_rest_api

transacted, answered, one_at_a_time, answers = (
    DynamoDBBackend.transact_write_items,
    DynamoHandler.transact_write_items,
    threading.RLock(),
    {},
)


def item_of(backend: DynamoDBBackend, action: dict) -> tuple[dict, DynamoType]:
    """The dictionary of a moto table that holds the item which an action may change, and its key there."""
    ((kind, content),) = action.items()
    table, key = backend.get_table(content["TableName"]), content["Item" if kind == "Put" else "Key"]
    hash_key = DynamoType(key[table.hash_key_attr])
    if table.range_key_attr is None:
        return table.items, hash_key
    return table.items[hash_key], DynamoType(key[table.range_key_attr])


def transact_write_items(self, transact_items):
    places = [item_of(self, action) for action in transact_items]
    before = [(items, key, copy.deepcopy(items.get(key))) for items, key in places]
    try:
        return transacted(self, transact_items)
    except Exception:
        for items, key, item in before:
            items.pop(key, None)
            if item is not None:
                items[key] = item
        raise


def answer_once(self):
    with one_at_a_time:
        token = self.body["ClientRequestToken"]
        if token not in answers:
            answers[token] = answered(self)
        return answers[token]


DynamoDBBackend.transact_write_items, DynamoHandler.transact_write_items = transact_write_items, answer_once
dynamodb.copy = SimpleNamespace(deepcopy=lambda thing: thing if isinstance(thing, Table) else copy.deepcopy(thing))

if __name__ == "__main__":
    sys.exit(main())
