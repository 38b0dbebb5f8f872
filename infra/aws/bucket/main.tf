# A bucket for what is not public: versioned, encrypted, over TLS only.

terraform {
  required_providers {
    aws = {
      source = "hashicorp/aws"
    }
  }
}

variable "name" {
  type = string
}

resource "aws_s3_bucket" "kept" {
  bucket = var.name

  # checkov:skip=CKV_AWS_18:who reads is in CloudTrail's data events where a company wants it; a second bucket of logs is the company's to choose
  # checkov:skip=CKV_AWS_144:every model can be made again from its data, settings and seed; versions protect against mistakes
  # checkov:skip=CKV_AWS_145:encrypted with keys that S3 manages; a key of one's own adds a permission to every reader
  # checkov:skip=CKV2_AWS_62:nothing waits for an object to appear; services look for a new champion themselves
}

resource "aws_s3_bucket_versioning" "kept" {
  bucket = aws_s3_bucket.kept.id

  versioning_configuration {
    status = "Enabled"
  }
}

resource "aws_s3_bucket_server_side_encryption_configuration" "kept" {
  bucket = aws_s3_bucket.kept.id

  rule {
    apply_server_side_encryption_by_default {
      sse_algorithm = "AES256"
    }
  }
}

resource "aws_s3_bucket_public_access_block" "kept" {
  bucket                  = aws_s3_bucket.kept.id
  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

resource "aws_s3_bucket_ownership_controls" "kept" {
  bucket = aws_s3_bucket.kept.id

  rule {
    object_ownership = "BucketOwnerEnforced"
  }
}

data "aws_iam_policy_document" "tls_only" {

  statement {
    sid       = "TlsOnly"
    effect    = "Deny"
    actions   = ["s3:*"]
    resources = [aws_s3_bucket.kept.arn, "${aws_s3_bucket.kept.arn}/*"]

    principals {
      type        = "*"
      identifiers = ["*"]
    }
    condition {
      test     = "Bool"
      variable = "aws:SecureTransport"
      values   = ["false"]
    }
  }
}

resource "aws_s3_bucket_policy" "kept" {
  bucket     = aws_s3_bucket.kept.id
  policy     = data.aws_iam_policy_document.tls_only.json
  depends_on = [aws_s3_bucket_public_access_block.kept]
}

output "name" {
  value = aws_s3_bucket.kept.id
}
