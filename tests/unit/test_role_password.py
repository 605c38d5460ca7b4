"""Verifiers: whether a password is the role's already is computed here, with verifiers that PostgreSQL has made."""

from __future__ import annotations

import pytest
from ansible_collections.settler.runbook.plugins.modules.role_password import fits

MADE = {  # by libpq's PQencryptPasswordConn
    "s3cret": "2UDp5BTHDkFDv5/hohVqaw==$FbnpNg8ueCbdNIGAkxCSfl1hBaLCfLyuakQyjYoFgIg=:"
    "RwTy8mjp4IsBd1Pz6G5I2+ueniK58U/fgTAcVzNAnbs=",
    "Füße ½ \u00a0x": "mQ4OM5Q1PnH11yDjSdNtRg==$0Z8OfoiAxDGw2TZM2RWZuOWd06NbGYUrOx8ixdARTFg=:"
    "AP1mjwhBS02/IMALwxT62QYMwDa47wGhoda8JGz9jyE=",
    "\u2168": "g10Qj77VxWRHnc8F8zD3ug==$XHmfAItA8OCf087PPqwk7/3K78E3qo0++cAh+MJBb6o=:"
    "d5uZuZzye+6rSEI88LtVMIwVTbtU9kCZFNTNNo32grY=",
}
VERIFIERS = {password: f"SCRAM-SHA-256$4096:{rest}" for password, rest in MADE.items()}


@pytest.mark.parametrize("password", VERIFIERS)
def test_password_fits_its_verifier_and_no_other(password):
    assert [other for other in VERIFIERS if fits(password, VERIFIERS[other])] == [password]


@pytest.mark.parametrize("other", ["", "s3cret ", "S3cret", "s3cre", "s3cret\n"])
def test_other_passwords_do_not_fit(other):
    assert not fits(other, VERIFIERS["s3cret"])


def test_normal_forms_of_one_password_fit_alike():
    assert fits("Fu\u0308\u00dfe \u00bd \u00a0x", VERIFIERS["Füße ½ \u00a0x"])
    assert fits("IX", VERIFIERS["\u2168"])


@pytest.mark.parametrize(
    "verifier",
    [
        None,
        "",
        "s3cret",
        "md5d8b0e6ba0e3ea3a4b3b8e0c9e7e1f2a1",
        "SCRAM-SHA-256$4096:2UDp5BTHDkFDv5/hohVqaw==",
        VERIFIERS["s3cret"].replace("SHA-256", "SHA-512"),
        VERIFIERS["s3cret"].replace("4096", "4097"),
        VERIFIERS["s3cret"].replace(":2UDp", ":3UDp"),
    ],
)
def test_any_other_verifier_does_not_fit(verifier):
    assert not fits("s3cret", verifier)
