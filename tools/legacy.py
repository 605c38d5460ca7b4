"""Fill a database with an old Settler schema and with rows that hurt, always the same for the same seed.

    python -m tools.legacy --conninfo "host=… dbname=…" --shape oldest --rows 40000 --seed 7 [--tenants 5]

A row is made as the fields of a line of COPY text: Python objects would cost more than PostgreSQL needs to store them.
Everything comes from ``random.Random(seed)``, nothing from the clock.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, TypeVar

import psycopg
from psycopg import sql

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from psycopg.rows import TupleRow

    Row = tuple[str, ...]
    Connection = psycopg.Connection[TupleRow]

T = TypeVar("T")

_SQL = Path(__file__).resolve().parent.parent / "sql"
_LEGACY = {path.stem.split("_", 1)[1]: path for path in sorted((_SQL / "legacy").glob("[0-9]*.sql"))}

#: The shapes of sql/legacy, oldest first; each is all its files up to and including its own.
SHAPES = list(_LEGACY)
#: The schema of sql/migrations, as a target of ``fill`` only: the migrations are the engine's to run.
CURRENT = "current"

_PIECE = 2000
_NULL = r"\N"


def _copy_text(value: str) -> str:
    """Escape a value for a line of COPY text."""
    return value.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")


def _copy_json(value: object) -> str:
    """Write a value as jsonb in a line of COPY text."""
    return _copy_text(json.dumps(value, ensure_ascii=False))


def _copy_array(values: list[str]) -> str:
    """Write strings as a text[] in a line of COPY text."""
    quoted = (value.replace("\\", "\\\\").replace('"', '\\"') for value in values)
    return _copy_text("{" + ",".join(f'"{value}"' for value in quoted) + "}")


_NASTY = [
    "", " ", "plain", "NULL", r"\N", r"\.", "O'Brien", 'say "hi"', r"C:\temp\new", "tab\there", "two\nlines\r\n",
    "100%s %(x)s", "$$; drop table jobs; --", "naïve café", "e\u0301 z\u200bero", "日本語", "\u202eleft", "🧾💶",
]  # fmt: skip
_TEXTS = [_copy_text(value) for value in _NASTY]
_TEXTS_OR_NULL = [*_TEXTS, _NULL]
_JSONS = [
    "{}",
    "[]",
    "null",
    _copy_json({"count": 0, "ratio": 0.1, "big": 10**30, "nested": {"list": [1, None, True, {"deep": []}]}}),
    *(_copy_json({"text": value, value or "empty": [value]}) for value in _NASTY),
]
_JSONS_OR_NULL = [*_JSONS, _NULL]
_MEGABYTE = _copy_json({"padding": ["0123456789abcdef" * 64] * 1024})
_ARRAYS = [_copy_array([]), _copy_array(["jobs:read", "jobs:write"]), _copy_array(_NASTY)]
_ARRAYS_OR_NULL = [*_ARRAYS, _NULL]
_ADAPTERS = ["stripe", "shopify", "quickbooks", "xero", "paypal", "square"]
_CURRENCIES = ["USD", "EUR", "JPY", "CHF", "", _NULL]
_STATUSES = ["completed"] * 14 + ["failed"] * 3 + ["running", "cancelled", _NULL]
_BOOLEANS = ["t", "t", "f", _NULL]
_LONG_AGO = [
    "0001-01-01 00:00:00",
    "1900-02-28 23:59:59.999999",
    "1969-07-20 20:17:40",
    "1969-12-31 23:59:59.5",
]
_START = datetime(2023, 1, 1)  # noqa: DTZ001 - the columns have no time zone


@dataclass
class _World:
    """The source of chance, and the rows that later rows refer to."""

    random: Random
    legacy: bool
    times: list[str] = field(default_factory=list)
    tenants: list[str] = field(default_factory=list)
    users: list[tuple[str, str]] = field(default_factory=list)
    api_keys: list[tuple[str, str]] = field(default_factory=list)
    jobs: list[tuple[str, str]] = field(default_factory=list)
    executions: list[tuple[str, str, str]] = field(default_factory=list)
    webhooks: list[str] = field(default_factory=list)
    flags: list[tuple[str, str]] = field(default_factory=list)
    events: list[tuple[str, str, str]] = field(default_factory=list)
    users_of: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Prepare the times: three years by the second, and a few before 1970."""
        seconds = (self.number(3 * 365 * 86400) for _ in range(2000))
        self.times = [str(_START + timedelta(seconds=second)) for second in seconds] + _LONG_AGO

    def number(self, limit: int) -> int:
        """Choose a number below the limit, several times as fast as ``Random.randrange``."""
        return int(self.random.random() * limit)

    def uuid(self) -> str:
        """Make a random UUID, of version 4 in form."""
        digits = f"{self.random.getrandbits(128):032x}"
        return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-a{digits[17:20]}-{digits[20:]}"

    def pick(self, values: list[T]) -> T:
        """Choose one of the values."""
        return values[int(self.random.random() * len(values))]

    def skewed(self, values: list[T]) -> T:
        """Choose one of the values, the first ones far more often."""
        return values[int(self.random.random() ** 3 * len(values))]

    def time(self) -> str:
        """Choose a time."""
        return self.pick(self.times)

    def time_or_null(self) -> str:
        """Choose a time, or none."""
        return _NULL if self.random.random() < 0.5 else self.pick(self.times)

    def text(self) -> str:
        """Choose a text, or none."""
        return self.pick(_TEXTS_OR_NULL)

    def own(self, tenant: str) -> str:
        """Say a row's tenant: some rows of an old database were never given theirs."""
        return _NULL if self.legacy and self.random.random() < 0.1 else tenant

    def tenant(self) -> str:
        """Choose the tenant of a row without a parent."""
        return self.own(self.skewed(self.tenants)) if self.tenants else _NULL


def _tenants(w: _World, rows: int) -> Iterator[Row]:
    parent = _NULL
    for n in range(rows):
        tenant = w.uuid()
        w.tenants.append(tenant)
        quotas = {"rateLimitRpm": 1000, "storageBytes": 2**40, "concurrentJobs": 5,
                  "monthlyReconciliations": 10**6, "customDomains": n % 3}  # fmt: skip
        yield (tenant, f"{w.pick(_TEXTS)} {n}", f"tenant-{n}", parent,
               w.pick(["free", "pro", "enterprise"]), "active",
               _copy_json(quotas), w.pick(_JSONS), w.pick(_JSONS_OR_NULL),
               w.time(), w.time(), w.time() if n % 10 == 9 else _NULL)  # fmt: skip
        parent = _NULL if n % 12 == 11 else tenant  # trees twelve deep


def _users(w: _World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        user, tenant = w.uuid(), w.tenant()
        w.users.append((user, tenant))
        w.users_of.setdefault(tenant, []).append(user)
        email = w.pick(["user{}@example.com", "O'Neil+{}@example.com", "Jürgen.{}@bücher.example", "用户{}@例え.jp"])
        yield (user, tenant, email.format(n), f"$2b$12${w.random.getrandbits(160):040x}", w.text(),
               w.pick(["admin", "developer", _NULL]), w.pick(["us", "eu", "", _NULL]),
               w.pick(["365", "0", _NULL]), w.time() if n % 20 == 19 else _NULL, _NULL, w.time(),
               w.time_or_null())  # fmt: skip


def _api_keys(w: _World, rows: int) -> Iterator[Row]:
    for _ in range(rows):
        key, (user, tenant) = w.uuid(), w.skewed(w.users)
        w.api_keys.append((key, tenant))
        secret = f"{w.random.getrandbits(256):064x}"
        yield (key, user, w.own(tenant), f"rk_{secret[:10]}", secret, w.text(), w.pick(_ARRAYS_OR_NULL),
               "1000", w.pick([_NULL, "{192.0.2.7,2001:db8::1}"]), w.time_or_null(), w.time_or_null(),
               w.time_or_null(), w.time(), w.time_or_null())  # fmt: skip


def _jobs(w: _World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        job, (user, tenant) = w.uuid(), w.skewed(w.users)
        w.jobs.append((job, tenant))
        yield (job, user, w.own(tenant), f"{w.pick(_TEXTS)} {n}", w.pick(_ADAPTERS),
               f"{w.random.getrandbits(512):0128x}", w.pick(_ADAPTERS),
               f"{w.random.getrandbits(512):0128x}", w.pick(_JSONS), w.pick(["0 2 * * *", "", _NULL]),
               w.pick(["active", "active", "paused", _NULL]), str(1 + n % 7), w.time(), w.time_or_null())  # fmt: skip


def _executions(w: _World, rows: int) -> Iterator[Row]:
    for _ in range(rows):
        execution, (job, tenant) = w.uuid(), w.skewed(w.jobs)
        w.executions.append((execution, job, tenant))
        started = w.time()
        yield (execution, job, w.own(tenant), w.pick(_STATUSES), started, w.time_or_null(), w.text(),
               w.pick(_JSONS_OR_NULL), w.pick([_NULL, str(w.number(3_600_000))]), started)  # fmt: skip


def _matches(w: _World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        execution, job, tenant = w.skewed(w.executions)
        at = w.time()
        yield (w.uuid(), execution, job, w.own(tenant), f"src_{n}", f"tgt_{n}",
               f"{w.number(10**8) - 10**6}.{n % 100:02}", w.pick(_CURRENCIES),
               _NULL if n % 50 == 49 else f"{w.number(101) / 100:.2f}", at, at)  # fmt: skip


def _unmatched(w: _World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        execution, job, tenant = w.skewed(w.executions)
        yield (w.uuid(), execution, job, w.own(tenant), w.pick([f"src_u{n}", "", _NULL]),
               w.pick([f"tgt_u{n}", _NULL]), w.pick([f"{n}.99", _NULL]), w.pick(_CURRENCIES), w.text(),
               w.time())  # fmt: skip


def _reports(w: _World, rows: int) -> Iterator[Row]:
    for _ in range(rows):
        execution, job, tenant = w.skewed(w.executions)
        yield (w.uuid(), job, execution, w.own(tenant), w.time_or_null(), w.time_or_null(), w.pick(_JSONS),
               w.time(), w.time())  # fmt: skip


def _webhooks(w: _World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        webhook, (user, tenant) = w.uuid(), w.skewed(w.users)
        w.webhooks.append(webhook)
        yield (webhook, user, w.own(tenant), f"https://example.com/hook/{n}?q=%20&x='", w.pick(_ARRAYS),
               f"whsec_{w.random.getrandbits(128):032x}", w.pick(["active", "disabled", _NULL]), w.time(),
               w.time())  # fmt: skip


def _webhook_payloads(w: _World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        yield (w.uuid(), w.pick(_ADAPTERS), w.tenant(), w.pick(_JSONS) if n else _MEGABYTE, w.text(),
               w.time(), w.pick(_BOOLEANS), w.time_or_null(), w.text(), w.time())  # fmt: skip


def _webhook_deliveries(w: _World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        yield (w.uuid(), w.skewed(w.webhooks), f"https://example.com/hook/{n}", w.pick(_JSONS),
               w.pick(["delivered", "failed", "pending", _NULL]), w.pick(["200", "500", _NULL]), w.text(),
               str(n % 5), w.time_or_null(), w.time_or_null(), w.time())  # fmt: skip


def _webhook_configs(w: _World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        yield (_ADAPTERS[n] if n < len(_ADAPTERS) else f"adapter-{n}",
               f"whsec_{w.random.getrandbits(128):032x}", w.pick(["hmac-sha256", "hmac-sha1", _NULL]),
               w.time(), w.time())  # fmt: skip


def _audit_logs(w: _World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        user, tenant = w.skewed(w.users)
        key = _NULL
        if n % 7 == 6:
            user, (key, tenant) = _NULL, w.skewed(w.api_keys)
        yield (w.uuid(), w.own(tenant), w.pick(["job.created", "login", "login.failed", ""]), user, key,
               w.pick(["192.0.2.1", "2001:db8::1", _NULL]), w.text(), w.pick(["GET", "POST", _NULL]),
               w.pick(["/v1/jobs", "/v1/é?q='\"", _NULL]), w.pick(["200", "404", _NULL]),
               w.pick(_JSONS_OR_NULL), w.time())  # fmt: skip


def _idempotency_keys(w: _World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        user, tenant = w.skewed(w.users)
        yield (w.uuid(), user, w.own(tenant), f"{w.pick(_TEXTS)}-{n}", w.pick(_JSONS), w.time(), w.time())


def _tenant_usage(w: _World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        month, tenant = divmod(n, len(w.tenants))
        start, end = (f"{1968 + m // 12}-{1 + m % 12:02}-01" for m in (month, month + 1))
        yield (w.uuid(), w.tenants[tenant], "reconciliation", str(w.number(10**6)), start, end, start)


def _tenant_quota_usage(w: _World, rows: int) -> Iterator[Row]:
    for tenant in w.tenants[:rows]:
        yield (tenant, w.pick([str(2**33), "0", _NULL]), w.pick(["3", _NULL]), w.pick(["0", _NULL]), w.time(),
               w.time())  # fmt: skip


def _feature_flags(w: _World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        flag, tenant = w.uuid(), _NULL if n % 4 == 0 else w.skewed(w.tenants)
        w.flags.append((flag, tenant))
        user = w.pick(w.users_of[tenant]) if n % 3 == 0 and tenant in w.users_of else _NULL
        yield (flag, f"{w.pick(_TEXTS)}-{n}", w.text(), w.pick(_BOOLEANS), w.pick(["0", "50", "100", _NULL]),
               tenant, user, w.pick(_JSONS_OR_NULL), w.time(), w.time(),
               w.time() if n % 9 == 8 else _NULL)  # fmt: skip


def _feature_flag_changes(w: _World, rows: int) -> Iterator[Row]:
    for _ in range(rows):
        flag, tenant = w.pick(w.flags)
        user = w.pick(w.users_of[tenant]) if tenant in w.users_of else _NULL
        yield (w.uuid(), flag, user, w.pick(_JSONS_OR_NULL), w.pick(_JSONS_OR_NULL), w.text(), w.time())


def _event_store(w: _World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        event, (execution, _, tenant) = w.uuid(), w.skewed(w.executions)
        w.events.append((event, execution, tenant))
        yield (str(n + 1), event, execution, "reconciliation", w.pick(["started", "matched", "completed"]),
               "1", w.pick(_JSONS), w.pick(_JSONS), w.own(tenant), w.time())  # fmt: skip


def _snapshots(w: _World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        event, aggregate, tenant = w.skewed(w.events)
        yield (str(n + 1), aggregate, "reconciliation", w.pick(_JSONS), str(n + 1), event, w.own(tenant),
               w.time())  # fmt: skip


def _saga_state(w: _World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        execution, _, tenant = w.skewed(w.executions)
        yield (w.uuid(), f"saga-{n} {w.pick(_TEXTS)}", "reconciliation", execution,
               w.pick(["fetch", "match", ""]), w.pick(_JSONS), w.pick(["running", "completed", "failed"]),
               w.text(), w.pick(["0", "3", _NULL]), w.pick(["3", _NULL]), w.time_or_null(), w.time_or_null(),
               w.own(tenant), w.uuid(), w.time(), w.time(), w.time_or_null())  # fmt: skip


def _dead_letter_queue(w: _World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        event, _, tenant = w.skewed(w.events)
        yield (w.uuid(), w.pick([f"saga-{n}", _NULL]), _NULL if n % 5 == 4 else event, "timeout",
               w.pick(_TEXTS), w.text(), w.pick(_JSONS), "3", "3", w.own(tenant), w.uuid(), w.time(),
               w.time_or_null(), w.text())  # fmt: skip


def _reconciliation_summary(w: _World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        job, tenant = w.skewed(w.jobs)
        yield (w.uuid(), job, w.pick(["running", "completed", "failed"]), str(n), str(n), str(n // 2), "0",
               w.pick(["0", _NULL]), "0", w.time(), w.time_or_null(), w.pick([str(n), _NULL]),
               w.pick(["99.95", "0", _NULL]), w.own(tenant), w.time())  # fmt: skip


def _tenant_usage_view(w: _World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        day, tenant = divmod(n, len(w.tenants))
        yield (w.tenants[tenant], str(date(1969, 12, 1) + timedelta(days=day)), str(n), w.pick(["0", _NULL]),
               str(n), "0")  # fmt: skip


def _error_hotspots_view(w: _World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        job, tenant = w.skewed(w.jobs)
        yield (w.uuid(), job, w.pick(["timeout", "parse", ""]), w.pick([str(n), _NULL]), w.pick(_TEXTS),
               w.time(), w.time(), w.own(tenant))  # fmt: skip


def _revoked_tokens(w: _World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        yield (f"jti-{n}-{w.uuid()}", w.time(), w.text(), w.time(), w.time())


def _blocked_ips(w: _World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        tenant = _NULL if n % 3 == 0 else w.skewed(w.tenants)
        yield (w.uuid(), f"2001:db8::{n // 2:x}", w.pick(_TEXTS), tenant, w.time(),
               w.time() if n % 2 else _NULL, w.time())  # fmt: skip


def _security_events(w: _World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        user, tenant = w.skewed(w.users) if n % 4 else (_NULL, _NULL)
        yield (w.uuid(), "login.failed", w.pick(["low", "high", "critical"]), tenant, user, _NULL,
               w.pick(["192.0.2.1", _NULL]), w.text(), w.pick(_JSONS_OR_NULL), w.pick(_BOOLEANS),
               w.time_or_null(), _NULL, w.time())  # fmt: skip


@dataclass(frozen=True)
class _Table:
    """How to fill a table: since which shape it exists, its share of the rows, what makes them, and its columns."""

    since: str
    share: int
    rows: Callable[[_World, int], Iterator[Row]]
    columns: str


#: Parents before children; ``tenants`` and ``tenant_quota_usage`` have one row per tenant instead of a share.
_TABLES = {
    "tenants": _Table("multi_tenancy", 0, _tenants,
        "id name slug parent_tenant_id tier status quotas config metadata created_at updated_at deleted_at"),
    "users": _Table("oldest", 20, _users,
        "id tenant_id email password_hash name role data_residency_region data_retention_days deleted_at "
        "deletion_scheduled_at created_at updated_at"),
    "api_keys": _Table("oldest", 15, _api_keys,
        "id user_id tenant_id key_prefix key_hash name scopes rate_limit ip_whitelist revoked_at expires_at "
        "last_used_at created_at updated_at"),
    "jobs": _Table("oldest", 25, _jobs,
        "id user_id tenant_id name source_adapter source_config_encrypted target_adapter "
        "target_config_encrypted rules schedule status version created_at updated_at"),
    "executions": _Table("oldest", 150, _executions,
        "id job_id tenant_id status started_at completed_at error summary duration_ms created_at"),
    "matches": _Table("oldest", 420, _matches,
        "id execution_id job_id tenant_id source_id target_id amount currency confidence matched_at "
        "created_at"),
    "unmatched": _Table("oldest", 100, _unmatched,
        "id execution_id job_id tenant_id source_id target_id amount currency reason created_at"),
    "reports": _Table("oldest", 25, _reports,
        "id job_id execution_id tenant_id date_range_start date_range_end summary generated_at created_at"),
    "webhooks": _Table("oldest", 10, _webhooks,
        "id user_id tenant_id url events secret status created_at updated_at"),
    "webhook_payloads": _Table("oldest", 30, _webhook_payloads,
        "id adapter tenant_id payload signature received_at processed processed_at error created_at"),
    "webhook_deliveries": _Table("oldest", 30, _webhook_deliveries,
        "id webhook_id url payload status status_code response_body attempts next_retry_at delivered_at "
        "created_at"),
    "webhook_configs": _Table("oldest", 1, _webhook_configs,
        "adapter secret signature_algorithm created_at updated_at"),
    "audit_logs": _Table("oldest", 80, _audit_logs,
        "id tenant_id event user_id api_key_id ip user_agent method path status_code metadata timestamp"),
    "idempotency_keys": _Table("oldest", 20, _idempotency_keys,
        "id user_id tenant_id key response created_at expires_at"),
    "tenant_usage": _Table("multi_tenancy", 4, _tenant_usage,
        "id tenant_id metric_type metric_value period_start period_end created_at"),
    "tenant_quota_usage": _Table("multi_tenancy", 0, _tenant_quota_usage,
        "tenant_id current_storage_bytes current_concurrent_jobs current_monthly_reconciliations "
        "last_reset_at updated_at"),
    "feature_flags": _Table("multi_tenancy", 4, _feature_flags,
        "id name description enabled rollout_percentage tenant_id user_id conditions created_at updated_at "
        "deleted_at"),
    "feature_flag_changes": _Table("multi_tenancy", 4, _feature_flag_changes,
        "id feature_flag_id changed_by old_value new_value reason created_at"),
    "event_store": _Table("event_sourcing", 60, _event_store,
        "id event_id aggregate_id aggregate_type event_type event_version data metadata tenant_id "
        "created_at"),
    "snapshots": _Table("event_sourcing", 5, _snapshots,
        "id aggregate_id aggregate_type snapshot_data snapshot_version event_id tenant_id created_at"),
    "saga_state": _Table("event_sourcing", 5, _saga_state,
        "id saga_id saga_type aggregate_id current_step state status error_message retry_count max_retries "
        "next_retry_at timeout_at tenant_id correlation_id created_at updated_at completed_at"),
    "dead_letter_queue": _Table("event_sourcing", 5, _dead_letter_queue,
        "id saga_id event_id error_type error_message error_stack payload retry_count max_retries tenant_id "
        "correlation_id created_at resolved_at resolution_notes"),
    "reconciliation_summary": _Table("cqrs_projections", 20, _reconciliation_summary,
        "reconciliation_id job_id status total_source_records total_target_records matched_count "
        "unmatched_source_count unmatched_target_count errors_count started_at completed_at duration_ms "
        "accuracy_percentage tenant_id updated_at"),
    "tenant_usage_view": _Table("cqrs_projections", 5, _tenant_usage_view,
        "tenant_id date reconciliation_count total_duration_ms success_count failure_count"),
    "error_hotspots_view": _Table("cqrs_projections", 5, _error_hotspots_view,
        "reconciliation_id job_id error_type error_count step first_occurred_at last_occurred_at tenant_id"),
    "revoked_tokens": _Table("security", 3, _revoked_tokens,
        "jti revoked_at reason expires_at created_at"),
    "blocked_ips": _Table("security", 3, _blocked_ips,
        "id ip reason tenant_id blocked_at unblocked_at created_at"),
    "security_events": _Table("security", 10, _security_events,
        "id event_type severity tenant_id user_id api_key_id ip user_agent details resolved resolved_at "
        "resolved_by created_at"),
}  # fmt: skip


def _tables(shape: str) -> dict[str, _Table]:
    """Return the tables that a shape has."""
    there = SHAPES if shape == CURRENT else SHAPES[: SHAPES.index(shape) + 1]
    return {name: table for name, table in _TABLES.items() if table.since in there}


def _counts(tables: dict[str, _Table], rows: int, tenants: int) -> dict[str, int]:
    """Share the rows out among the tables: at least two each, about that many in all."""
    shares = sum(table.share for table in tables.values())
    return {name: max(2, rows * table.share // shares) if table.share else tenants for name, table in tables.items()}


def stream(shape: str, rows: int, seed: int, tenants: int = 5) -> Iterator[tuple[str, list[str], Iterator[bytes]]]:
    """Yield each table of a shape, parents first: its name, its columns, and its rows as pieces of COPY text.

    The pieces of a table must be taken before the next table: its rows refer to them.
    """
    if tenants < 1:
        raise ValueError("a database with tenants has one at least")
    tables = _tables(shape)
    world = _World(Random(seed), legacy=shape != CURRENT)  # noqa: S311 - repeatable on purpose
    for name, count in _counts(tables, rows, tenants).items():
        columns = tables[name].columns.split()
        made = tables[name].rows(world, count)
        if shape == SHAPES[0] and "tenant_id" in columns:
            position = columns.index("tenant_id")
            made = (row[:position] + row[position + 1 :] for row in made)
            columns.remove("tenant_id")
        yield name, columns, _pieces("\t".join(row) for row in made)


def _pieces(lines: Iterator[str]) -> Iterator[bytes]:
    """Put lines together, to send many at once."""
    while piece := list(islice(lines, _PIECE)):
        yield ("\n".join(piece) + "\n").encode()


def create(connection: Connection, shape: str) -> None:
    """Create the empty schema of a legacy shape."""
    for name in SHAPES[: SHAPES.index(shape) + 1]:
        connection.execute(_LEGACY[name].read_bytes())


def fill(connection: Connection, shape: str, rows: int, seed: int, tenants: int = 5) -> int:
    """Load about that many rows into the tables of a shape, in one transaction, and return how many it were.

    The triggers rest meanwhile: the rows are as old as the tables, and some lack a tenant that a trigger would fill in.
    """
    tables = list(_tables(shape))
    copied = 0
    with connection.transaction():
        _set_triggers(connection, tables, "DISABLE")
        make_again = _put_aside(connection, tables)
        for name, columns, pieces in stream(shape, rows, seed, tenants):
            copied += _copy(connection, name, columns, pieces)
        for statement in make_again:
            connection.execute(statement)
        _set_triggers(connection, tables, "ENABLE")
        _finish(connection, tables)
    return copied


def _copy(connection: Connection, name: str, columns: list[str], pieces: Iterator[bytes]) -> int:
    """Load the rows of a table, and return how many it were."""
    names = sql.SQL(", ").join(map(sql.Identifier, columns))
    statement = sql.SQL("COPY {} ({}) FROM STDIN (ENCODING 'UTF8')").format(sql.Identifier(name), names)
    with connection.cursor() as cursor:
        with cursor.copy(statement) as copy:
            for piece in pieces:
                copy.write(piece)
        return cursor.rowcount


def _set_triggers(connection: Connection, tables: list[str], state: str) -> None:
    """Switch the tables' own triggers off or on; foreign keys are always checked."""
    for name in tables:
        connection.execute(sql.SQL("ALTER TABLE {} {} TRIGGER USER").format(sql.Identifier(name), sql.SQL(state)))


def _put_aside(connection: Connection, tables: list[str]) -> list[bytes]:
    """Drop foreign keys and plain indexes, and return what makes them again: pg_restore is fast for the same reason."""
    found = connection.execute(
        """
        SELECT 'ALTER TABLE ' || conrelid::regclass || ' DROP CONSTRAINT ' || quote_ident(conname),
            'ALTER TABLE ' || conrelid::regclass || ' ADD CONSTRAINT ' || quote_ident(conname) || ' '
              || pg_get_constraintdef(oid)
          FROM pg_constraint WHERE contype = 'f' AND conrelid = ANY (%(tables)s::text[]::regclass[])
        UNION ALL
        SELECT 'DROP INDEX ' || indexrelid::regclass, pg_get_indexdef(indexrelid)
          FROM pg_index WHERE NOT indisunique AND indrelid = ANY (%(tables)s::text[]::regclass[])
        ORDER BY 1
        """,
        {"tables": tables},
    ).fetchall()
    for drop, _ in found:
        connection.execute(drop.encode())
    return [make.encode() for _, make in found]


def _finish(connection: Connection, tables: list[str]) -> None:
    """Leave sequences and materialized views as in a database in use."""
    for name in {"event_store", "snapshots"} & set(tables):
        connection.execute(
            sql.SQL("SELECT setval(pg_get_serial_sequence({0}, 'id'), max(id)) FROM {1}").format(
                name, sql.Identifier(name)
            )
        )
    views = connection.execute("SELECT schemaname, matviewname FROM pg_matviews WHERE ispopulated").fetchall()
    for schema, view in views:
        connection.execute(sql.SQL("REFRESH MATERIALIZED VIEW {}").format(sql.Identifier(schema, view)))


def main() -> int:
    """Make a legacy database, as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m tools.legacy", description=__doc__.partition("\n")[0])
    parser.add_argument("--conninfo", required=True, help="of an empty database; the password comes from PGPASSFILE")
    parser.add_argument("--shape", required=True, choices=[*SHAPES, CURRENT], help="current: only rows, migrate first")
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tenants", type=int, default=5)
    arguments = parser.parse_args()
    start = time.monotonic()
    with psycopg.connect(arguments.conninfo) as connection:
        if arguments.shape != CURRENT:
            create(connection, arguments.shape)
        rows = fill(connection, arguments.shape, arguments.rows, arguments.seed, arguments.tenants)
    seconds = time.monotonic() - start
    print(f"{rows} rows in {seconds:.1f} s ({rows / seconds:,.0f} rows/s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
