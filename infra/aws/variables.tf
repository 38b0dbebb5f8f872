variable "region" {
  description = "Where everything lives."
  type        = string

  validation {
    condition     = can(regex("^[a-z]{2}(-[a-z]+)+-[0-9]$", var.region))
    error_message = "Expected a region such as eu-central-1."
  }
}

variable "repository" {
  description = "The GitHub repository that may deploy, OWNER/NAME."
  type        = string

  validation {
    condition     = can(regex("^[A-Za-z0-9-]+/[A-Za-z0-9._-]+$", var.repository))
    error_message = "Expected OWNER/NAME, without a wildcard."
  }
}

variable "branch" {
  description = "The branch that may push images."
  type        = string
  default     = "main"

  validation {
    condition     = can(regex("^[A-Za-z0-9._/-]+$", var.branch))
    error_message = "Expected one branch, without a wildcard."
  }
}

variable "name" {
  description = "What makes the buckets' names yours: fraud-models-NAME and fraud-dvc-NAME. The functions may read no bucket but fraud-models-*."
  type        = string

  validation {
    condition     = can(regex("^[a-z0-9]([a-z0-9-]{0,48}[a-z0-9])?$", var.name))
    error_message = "Expected at most 50 lower-case letters, digits and dashes."
  }
}

variable "stages" {
  description = "Stages of chalice_app/.chalice/config.json; each is a GitHub environment too."
  type        = set(string)
  default     = ["dev", "prod"]

  validation {
    condition     = length(var.stages) > 0 && alltrue([for stage in var.stages : can(regex("^[a-z][a-z0-9]{0,15}$", stage))])
    error_message = "Expected at least one stage, each of lower-case letters and digits."
  }
}

variable "create_oidc_provider" {
  description = "An account has one provider for GitHub. false: it is there already."
  type        = bool
  default     = true
}

variable "apis" {
  description = "API Gateway's id of a stage, once it is there: with it the stage's role touches no other API of the account. chalice gives its APIs no tags to tell them by."
  type        = map(string)
  default     = {}

  validation {
    condition     = alltrue([for id in values(var.apis) : can(regex("^[a-z0-9]{10}$", id))])
    error_message = "Expected ids of REST APIs, such as {dev = \"a1b2c3d4e5\"}."
  }
}

variable "code_signing" {
  description = "What AWS does with code of a function that no profile of AWS Signer has signed: Off (nothing is made), Warn, Enforce."
  type        = string
  default     = "Off"

  validation {
    condition     = contains(["Off", "Warn", "Enforce"], var.code_signing)
    error_message = "Expected Off, Warn or Enforce."
  }
}
