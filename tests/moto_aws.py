"""moto's server, closer to AWS in two places.

Chalice sends Swagger 2.0; moto's API Gateway takes OpenAPI 3 only, and reads from both what they have in common.
DynamoDB's transactions are serialisable; moto runs them in the threads of its web server without a lock.
"""

import sys
import threading

from moto.apigateway.models import APIGatewayBackend
from moto.dynamodb.models import DynamoDBBackend
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

transacted, one_at_a_time = DynamoDBBackend.transact_write_items, threading.Lock()


def transact_write_items(self, *arguments, **named):
    with one_at_a_time:
        return transacted(self, *arguments, **named)


DynamoDBBackend.transact_write_items = transact_write_items

if __name__ == "__main__":
    sys.exit(main())
