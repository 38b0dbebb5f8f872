# What has to outlive every deployment: models, the data of DVC, the stores.

module "bucket" {
  for_each = toset(["models", "dvc"])
  source   = "./bucket"
  name     = "fraud-${each.value}-${var.name}"
}

# As fraud_pkg.store.create_table makes it.
resource "aws_dynamodb_table" "store" {
  for_each                    = var.stages
  name                        = "fraud-store-${each.value}"
  billing_mode                = "PAY_PER_REQUEST"
  hash_key                    = "key"
  deletion_protection_enabled = true

  attribute {
    name = "key"
    type = "S"
  }
  ttl {
    attribute_name = "expires"
    enabled        = true
  }
  point_in_time_recovery {
    enabled = true
  }

  # checkov:skip=CKV_AWS_119:encrypted with DynamoDB's own key; a key of one's own adds a call to every decision
}

# Where the functions write, which chalice does not make: the one that it makes is for another name (fraud-STAGE-api_handler).
resource "aws_cloudwatch_log_group" "function" {
  for_each          = var.stages
  name              = "/aws/lambda/fraud-${each.value}"
  retention_in_days = 90

  # checkov:skip=CKV_AWS_158:encrypted with keys that CloudWatch manages; lines hold no account and no amount
  # checkov:skip=CKV_AWS_338:what has to be kept for a year is the decisions, not the lines about requests
}
