"""moto's server, with Chalice's Swagger 2.0 documents relabelled: moto's API Gateway takes OpenAPI 3 only, and reads from both what they have in common."""

import sys

from moto.apigateway.models import APIGatewayBackend
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

if __name__ == "__main__":
    sys.exit(main())
