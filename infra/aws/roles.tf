# Who may do what. GitHub proves with a short-lived token which repository, branch or environment a job belongs to; there are no keys to keep.

data "aws_caller_identity" "current" {}

locals {
  account = data.aws_caller_identity.current.account_id
  issuer  = "token.actions.githubusercontent.com"
  provider_arn = (
    var.create_oidc_provider
    ? aws_iam_openid_connect_provider.github[0].arn
    : "arn:aws:iam::${local.account}:oidc-provider/${local.issuer}"
  )
  # A job in an environment is known by the environment, any other by its branch. Never by a pull request.
  may_assume = merge(
    { images = "repo:${var.repository}:ref:refs/heads/${var.branch}" },
    { for stage in var.stages : stage => "repo:${var.repository}:environment:${stage}" },
  )
  # What a stage's policies may name: nothing of another stage.
  stage_values = {
    for stage in var.stages : stage => {
      account = local.account
      region  = var.region
      models  = module.bucket["models"].name
      stage   = stage
    }
  }
}

resource "aws_iam_openid_connect_provider" "github" {
  count          = var.create_oidc_provider ? 1 : 0
  url            = "https://${local.issuer}"
  client_id_list = ["sts.amazonaws.com"]
}

data "aws_iam_policy_document" "trust" {
  for_each = local.may_assume

  statement {
    actions = ["sts:AssumeRoleWithWebIdentity"]

    principals {
      type        = "Federated"
      identifiers = [local.provider_arn]
    }
    condition {
      test     = "StringEquals"
      variable = "${local.issuer}:aud"
      values   = ["sts.amazonaws.com"]
    }
    condition {
      test     = "StringEquals"
      variable = "${local.issuer}:sub"
      values   = [each.value]
    }
  }
}

# Pushes images, and nothing else.
resource "aws_iam_role" "images" {
  name                 = "fraud-ci-images"
  assume_role_policy   = data.aws_iam_policy_document.trust["images"].json
  max_session_duration = 3600
}

resource "aws_iam_role_policy" "images" {
  name   = "images"
  role   = aws_iam_role.images.id
  policy = templatefile("${path.module}/policies/images.json.tftpl", { account = local.account, region = var.region })
}

# Deploys one stage, and nothing else.
resource "aws_iam_role" "deploy" {
  for_each             = var.stages
  name                 = "fraud-ci-deploy-${each.value}"
  assume_role_policy   = data.aws_iam_policy_document.trust[each.value].json
  max_session_duration = 3600
}

resource "aws_iam_role_policy" "deploy" {
  for_each = var.stages
  name     = "deploy"
  role     = aws_iam_role.deploy[each.value].id
  policy = templatefile("${path.module}/policies/deploy.json.tftpl", merge(local.stage_values[each.value], {
    boundary = aws_iam_policy.function_boundary[each.value].arn
    api      = lookup(var.apis, each.value, "*")
  }))
}

# The functions' own roles are made here and not by chalice: whoever deploys can write their policies, but never beyond this boundary, and can make no role.
resource "aws_iam_policy" "function_boundary" {
  for_each = var.stages
  name     = "fraud-function-boundary-${each.value}"
  policy   = templatefile("${path.module}/policies/function-boundary.json.tftpl", local.stage_values[each.value])
}

data "aws_iam_policy_document" "lambda" {
  statement {
    actions = ["sts:AssumeRole"]

    principals {
      type        = "Service"
      identifiers = ["lambda.amazonaws.com"]
    }
  }
}

resource "aws_iam_role" "function" {
  for_each             = var.stages
  name                 = "fraud-${each.value}-api_handler" # as chalice looks for it
  assume_role_policy   = data.aws_iam_policy_document.lambda.json
  permissions_boundary = aws_iam_policy.function_boundary[each.value].arn
}
