# What the workflows have to be told, by the name of the repository variable.

output "AWS_REGION" {
  value = var.region
}

output "AWS_IMAGES_ROLE_ARN" {
  value = aws_iam_role.images.arn
}

output "AWS_DEPLOY_ROLES" {
  description = "By stage, as JSON."
  value       = jsonencode({ for stage, role in aws_iam_role.deploy : stage => role.arn })
}

output "ECR_REGISTRY" {
  value = "${local.account}.dkr.ecr.${var.region}.amazonaws.com"
}

output "FRAUD_MODELS_BUCKET" {
  value = module.bucket["models"].name
}

output "FRAUD_CHAMPION_URL" {
  value = "s3://${module.bucket["models"].name}/champion"
}

output "dvc_remote" {
  description = "For: dvc remote modify store url ..."
  value       = "s3://${module.bucket["dvc"].name}"
}

output "environments" {
  description = "GitHub environments to make."
  value       = var.stages
}

output "code_signing" {
  description = "By stage: the profile that signs, and the configuration that `aws lambda put-function-code-signing-config` gives the function."
  value = { for stage, config in aws_lambda_code_signing_config.package : stage => {
    profile = aws_signer_signing_profile.package[stage].name
    config  = config.arn
  } }
}
