# What AWS itself asks of a stage's code: the signature of a profile of AWS Signer. Beside the project's own, which
# `fraud deploy` asks for: whoever holds a deploy role can call AWS without it, and cannot get round this one.

locals {
  signed_stages = var.code_signing == "Off" ? toset([]) : var.stages
}

resource "aws_signer_signing_profile" "package" {
  for_each    = local.signed_stages
  name        = "fraud_${each.value}"
  platform_id = "AWSLambda-SHA384-ECDSA"
}

resource "aws_lambda_code_signing_config" "package" {
  for_each    = local.signed_stages
  description = "Code of fraud-${each.value}"

  allowed_publishers {
    signing_profile_version_arns = [aws_signer_signing_profile.package[each.value].version_arn]
  }
  policies {
    untrusted_artifact_on_deployment = var.code_signing
  }
}
