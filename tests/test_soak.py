"""The soak test: FRAUD_SOAK_MINUTES says how long (a minute and a half unless it is set)."""

import os

import pytest
import soak


@pytest.mark.long(reason="a minute and a half of payments and kills; FRAUD_SOAK_MINUTES=60 for the whole hour")
def test_payments_while_everything_is_killed(tmp_path):
    minutes = os.environ.get("FRAUD_SOAK_MINUTES")
    if minutes:
        print(soak.soak(tmp_path, 60 * float(minutes)))
    else:
        print(soak.soak(tmp_path, 90, pause=(6, 12)))
