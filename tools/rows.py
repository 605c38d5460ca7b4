"""What makes the rows of each table, each row as the fields of a line of COPY text.

Python objects would cost more than PostgreSQL needs to store them. All chance comes from ``Random.random`` and
``Random.getrandbits``, which every Python answers alike, nothing from the clock, and no float goes through the C
library's ``pow``: the same seed makes the same rows on every machine.
"""

from __future__ import annotations

from bisect import bisect
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from decimal import Context, Decimal
from itertools import accumulate
from typing import TYPE_CHECKING, Generic, TypeVar

from tools.values import (
    AMOUNTS,
    ARRAYS,
    ARRAYS_OR_NULL,
    BIGINTS,
    BOOLEANS,
    INTEGERS,
    JSONS,
    JSONS_OR_NULL,
    LONGEST_NAME,
    MEGABYTE,
    NULL,
    TEXTS,
    TEXTS_OR_NULL,
    TIMES,
    UUIDS,
    copy_json,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from random import Random

    Row = tuple[str, ...]

T = TypeVar("T")

_ADAPTERS = ["stripe", "shopify", "quickbooks", "xero", "paypal", "square"]
_CURRENCIES = ["USD", "EUR", "JPY", "CHF", "", NULL]
_STATUSES = ["completed"] * 14 + ["failed"] * 3 + ["running", "cancelled", NULL]
_START = datetime(2023, 1, 1)  # noqa: DTZ001 - the columns have no time zone


class Parents(Generic[T]):
    """Rows that others refer to, by the rank of their tenant; the tenants that have any are always the first ones."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.of: list[list[T]] = []

    def add(self, rank: int, row: T) -> None:
        """Remember a row."""
        if rank == len(self.of):
            self.of.append([])
        self.of[rank].append(row)

    def pick(self, n: int) -> tuple[int, T]:
        """Choose the parent of a table's nth row, and say its tenant's rank.

        Each tenant is served once before its share counts, so that none stays without rows. Within a tenant the first
        parents are chosen far more often.
        """
        rank = self._world.rank(n, len(self.of))
        rows, chance = self.of[rank], self._world.random.random()
        return rank, rows[int(chance * chance * chance * len(rows))]


@dataclass
class World:
    """The source of chance, and the rows that later rows refer to.

    Without tenants there is one, whose id is NULL.
    """

    random: Random
    legacy: bool
    skew: float
    times: list[str] = field(default_factory=list)
    tenants: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Prepare the times: three years by the second, and one in a hundred that hurts."""
        seconds = (self.number(3 * 365 * 86400) for _ in range(100 * len(TIMES)))
        self.times = [str(_START + timedelta(seconds=second)) for second in seconds] + TIMES
        self.users: Parents[tuple[str, str]] = Parents(self)
        self.api_keys: Parents[tuple[str, str]] = Parents(self)
        self.jobs: Parents[tuple[str, str]] = Parents(self)
        self.executions: Parents[tuple[str, str, str]] = Parents(self)
        self.webhooks: Parents[str] = Parents(self)
        self.events: Parents[tuple[str, str, str]] = Parents(self)
        self.flags: list[tuple[str, bool, int]] = []
        self._shares: list[int] = []

    def settle(self, tenants: list[str]) -> None:
        """Make the tenants known: the share of the kth, counted from 1, is one in k to the power of the skew."""
        self.tenants = tenants
        exact, skew = Context(prec=12), Decimal(str(self.skew))
        weights = (exact.exp(-skew * exact.ln(Decimal(k))) for k in range(1, len(tenants) + 1))
        self._shares = list(accumulate(int(weight.scaleb(12)) + 1 for weight in weights))

    def rank(self, n: int, among: int) -> int:
        """Choose the tenant of a table's nth row among the first ones, by their shares after one row for each."""
        if n < among:
            return n
        return bisect(self._shares, self.random.random() * self._shares[among - 1], 0, among - 1)

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

    def seldom(self, n: int, values: list[str], otherwise: str) -> str:
        """Return one of the values for every 50th row."""
        return self.pick(values) if n % 50 == 49 else otherwise

    def time(self) -> str:
        """Choose a time."""
        return self.pick(self.times)

    def time_or_null(self) -> str:
        """Choose a time, or none."""
        return NULL if self.random.random() < 0.5 else self.pick(self.times)

    def text(self) -> str:
        """Choose a text, or none."""
        return self.pick(TEXTS_OR_NULL)

    def own(self, tenant: str) -> str:
        """Say a row's tenant: some rows of an old database were never given theirs."""
        return NULL if self.legacy and self.random.random() < 0.1 else tenant

    def tenant(self, n: int) -> str:
        """Choose the tenant of a row without a parent."""
        return self.own(self.tenants[self.rank(n, len(self.tenants))])

    def user_of(self, rank: int) -> str:
        """Choose a user who really belongs to the tenant, or none."""
        user, tenant = self.pick(self.users.of[rank]) if rank < len(self.users.of) else (NULL, NULL)
        return user if tenant == self.tenants[rank] else NULL


def _tenants(w: World, rows: int) -> Iterator[Row]:
    tenants = [w.uuid() for _ in range(rows)]
    w.settle(tenants)
    for n, tenant in enumerate(tenants):
        # Trees of 64, as deep as they are large but for every fourth tenant, which hangs on any earlier one.
        earlier = w.number(n) if n % 4 == 3 else n - 1
        quotas = {"rateLimitRpm": 1000, "storageBytes": 2**40, "concurrentJobs": 5,
                  "monthlyReconciliations": 10**6, "customDomains": n % 3}  # fmt: skip
        yield (tenant, f"{w.pick(TEXTS)} {n}" if n else LONGEST_NAME, f"tenant-{n}",
               tenants[earlier] if n % 64 else NULL, w.pick(["free", "pro", "enterprise"]), "active",
               copy_json(quotas), w.pick(JSONS), w.pick(JSONS_OR_NULL), w.time(), w.time(),
               w.time() if n % 10 == 9 else NULL)  # fmt: skip


def _users(w: World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        rank = w.rank(n, len(w.tenants))
        user, tenant = w.uuid(), w.own(w.tenants[rank])
        w.users.add(rank, (user, tenant))
        email = w.pick(["user{}@example.com", "O'Neil+{}@example.com", "Jürgen.{}@bücher.example", "用户{}@例え.jp"])
        if n < len(w.tenants) and not w.legacy:
            email = "admin@example.com"  # unique in a tenant only; the old files said: in the whole database
        yield (user, tenant, email.format(n), f"$2b$12${w.random.getrandbits(160):040x}",
               w.seldom(n, [LONGEST_NAME], w.text()), w.pick(["admin", "developer", NULL]),
               w.pick(["us", "eu", "", NULL]), w.seldom(n, INTEGERS, "365"),
               w.time() if n % 20 == 19 else NULL, NULL, w.time(), w.time_or_null())  # fmt: skip


def _api_keys(w: World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        key, (rank, (user, tenant)) = w.uuid(), w.users.pick(n)
        w.api_keys.add(rank, (key, tenant))
        secret = f"{w.random.getrandbits(256):064x}"
        yield (key, user, w.own(tenant), f"rk_{secret[:10]}", secret, w.text(), w.pick(ARRAYS_OR_NULL),
               w.seldom(n, INTEGERS, "1000"), w.pick([NULL, "{192.0.2.7,2001:db8::1}"]), w.time_or_null(),
               w.time_or_null(), w.time_or_null(), w.time(), w.time_or_null())  # fmt: skip


def _jobs(w: World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        job, (rank, (user, tenant)) = w.uuid(), w.users.pick(n)
        w.jobs.add(rank, (job, tenant))
        yield (job, user, w.own(tenant), f"{w.pick(TEXTS)} {n}", w.pick(_ADAPTERS),
               f"{w.random.getrandbits(512):0128x}", w.pick(_ADAPTERS),
               f"{w.random.getrandbits(512):0128x}", w.pick(JSONS), w.pick(["0 2 * * *", "", NULL]),
               w.pick(["active", "active", "paused", NULL]), w.seldom(n, INTEGERS, str(1 + n % 7)), w.time(),
               w.time_or_null())  # fmt: skip


def _executions(w: World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        execution, (rank, (job, tenant)) = w.uuid(), w.jobs.pick(n)
        w.executions.add(rank, (execution, job, tenant))
        started = w.time()
        yield (execution, job, w.own(tenant), w.pick(_STATUSES), started, w.time_or_null(), w.text(),
               w.pick(JSONS_OR_NULL), w.seldom(n, [*BIGINTS, NULL], str(w.number(3_600_000))), started)  # fmt: skip


def _matches(w: World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        _, (execution, job, tenant) = w.executions.pick(n)
        at = w.time()
        yield (w.uuid(), execution, job, w.own(tenant), f"src_{n}", f"tgt_{n}",
               w.seldom(n, AMOUNTS, f"{w.number(10**8) - 10**6}.{n % 100:02}"), w.pick(_CURRENCIES),
               w.seldom(n, ["0", "1.00", NULL], f"{w.number(101) / 100:.2f}"), at, at)  # fmt: skip


def _unmatched(w: World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        _, (execution, job, tenant) = w.executions.pick(n)
        yield (w.uuid(), execution, job, w.own(tenant), w.pick([f"src_u{n}", "", NULL]),
               w.pick([f"tgt_u{n}", NULL]), w.seldom(n, AMOUNTS, f"{n}.99"), w.pick(_CURRENCIES), w.text(),
               w.time())  # fmt: skip


def _reports(w: World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        _, (execution, job, tenant) = w.executions.pick(n)
        yield (w.uuid(), job, execution, w.own(tenant), w.time_or_null(), w.time_or_null(), w.pick(JSONS),
               w.time(), w.time())  # fmt: skip


def _webhooks(w: World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        webhook, (rank, (user, tenant)) = w.uuid(), w.users.pick(n)
        w.webhooks.add(rank, webhook)
        yield (webhook, user, w.own(tenant), f"https://example.com/hook/{n}?q=%20&x='", w.pick(ARRAYS),
               f"whsec_{w.random.getrandbits(128):032x}", w.pick(["active", "disabled", NULL]), w.time(),
               w.time())  # fmt: skip


def _webhook_payloads(w: World, rows: int) -> Iterator[Row]:
    # The first megabyte compresses to nothing, the second not at all.
    megabytes = [MEGABYTE, f'"{w.random.getrandbits(1 << 22):x}"']
    for n in range(rows):
        yield (w.uuid(), w.pick(_ADAPTERS), w.tenant(n), megabytes[n] if n < len(megabytes) else w.pick(JSONS),
               w.text(), w.time(), w.pick(BOOLEANS), w.time_or_null(), w.text(), w.time())  # fmt: skip


def _webhook_deliveries(w: World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        _, webhook = w.webhooks.pick(n)
        yield (w.uuid(), webhook, f"https://example.com/hook/{n}", w.pick(JSONS),
               w.pick(["delivered", "failed", "pending", NULL]), w.pick(["200", "500", NULL]), w.text(),
               w.seldom(n, INTEGERS, str(n % 5)), w.time_or_null(), w.time_or_null(), w.time())  # fmt: skip


def _webhook_configs(w: World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        yield (_ADAPTERS[n] if n < len(_ADAPTERS) else f"adapter-{n}",
               f"whsec_{w.random.getrandbits(128):032x}", w.pick(["hmac-sha256", "hmac-sha1", NULL]),
               w.time(), w.time())  # fmt: skip


def _audit_logs(w: World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        key = NULL
        if n % 7 == 6:
            user, (_, (key, tenant)) = NULL, w.api_keys.pick(n)
        else:
            _, (user, tenant) = w.users.pick(n)
        yield (w.uuid(), w.own(tenant), w.pick(["job.created", "login", "login.failed", ""]), user, key,
               w.pick(["192.0.2.1", "2001:db8::1", NULL]), w.text(), w.pick(["GET", "POST", NULL]),
               w.pick(["/v1/jobs", "/v1/é?q='\"", NULL]), w.seldom(n, INTEGERS, "200"),
               w.pick(JSONS_OR_NULL), w.time())  # fmt: skip


def _idempotency_keys(w: World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        _, (user, tenant) = w.users.pick(n)
        yield (w.uuid(), user, w.own(tenant), f"{w.pick(TEXTS)}-{n}", w.pick(JSONS), w.time(), w.time())


def _tenant_usage(w: World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        month, tenant = divmod(n, len(w.tenants))
        start, end = (f"{1968 + m // 12}-{1 + m % 12:02}-01" for m in (month, month + 1))
        yield (w.uuid(), w.tenants[tenant], "reconciliation", w.seldom(n, BIGINTS, str(w.number(10**6))), start,
               end, start)  # fmt: skip


def _tenant_quota_usage(w: World, _rows: int) -> Iterator[Row]:
    for n, tenant in enumerate(w.tenants):
        yield (tenant, w.seldom(n, BIGINTS, str(2**33)), w.pick(["3", NULL]), w.pick(["0", NULL]), w.time(),
               w.time())  # fmt: skip


def _feature_flags(w: World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        flag, rank = w.uuid(), w.rank(n, len(w.tenants))
        everyone = n % 4 == 0
        w.flags.append((flag, everyone, rank))
        yield (flag, f"{w.pick(TEXTS)}-{n}", w.text(), w.pick(BOOLEANS), w.pick(["0", "50", "100", NULL]),
               NULL if everyone else w.tenants[rank], NULL if everyone or n % 3 else w.user_of(rank),
               w.pick(JSONS_OR_NULL), w.time(), w.time(), w.time() if n % 9 == 8 else NULL)  # fmt: skip


def _feature_flag_changes(w: World, rows: int) -> Iterator[Row]:
    for _ in range(rows):
        flag, everyone, rank = w.pick(w.flags)
        yield (w.uuid(), flag, NULL if everyone else w.user_of(rank), w.pick(JSONS_OR_NULL), w.pick(JSONS_OR_NULL),
               w.text(), w.time())  # fmt: skip


def _event_store(w: World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        event, (rank, (execution, _, tenant)) = w.uuid(), w.executions.pick(n)
        w.events.add(rank, (event, execution, tenant))
        yield (str(n + 1), event, execution, "reconciliation", w.pick(["started", "matched", "completed"]),
               w.seldom(n, INTEGERS, "1"), w.pick(JSONS) if n else MEGABYTE, w.pick(JSONS), w.own(tenant),
               w.time())  # fmt: skip


def _snapshots(w: World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        _, (event, aggregate, tenant) = w.events.pick(n)
        yield (str(n + 1), aggregate, "reconciliation", w.pick(JSONS), str(n + 1), event, w.own(tenant),
               w.time())  # fmt: skip


def _saga_state(w: World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        _, (execution, _, tenant) = w.executions.pick(n)
        yield (w.uuid(), f"saga-{n} {w.pick(TEXTS)}", "reconciliation", execution,
               w.pick(["fetch", "match", ""]), w.pick(JSONS), w.pick(["running", "completed", "failed"]),
               w.text(), w.seldom(n, INTEGERS, "0"), w.pick(["3", NULL]), w.time_or_null(), w.time_or_null(),
               w.own(tenant), w.seldom(n, UUIDS, w.uuid()), w.time(), w.time(), w.time_or_null())  # fmt: skip


def _dead_letter_queue(w: World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        _, (event, _, tenant) = w.events.pick(n)
        yield (w.uuid(), w.pick([f"saga-{n}", NULL]), NULL if n % 5 == 4 else event, "timeout",
               w.pick(TEXTS), w.text(), w.pick(JSONS), "3", "3", w.own(tenant), w.seldom(n, UUIDS, w.uuid()),
               w.time(), w.time_or_null(), w.text())  # fmt: skip


def _reconciliation_summary(w: World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        _, (job, tenant) = w.jobs.pick(n)
        yield (w.uuid(), job, w.pick(["running", "completed", "failed"]), str(n), str(n), str(n // 2), "0",
               w.seldom(n, INTEGERS, "0"), "0", w.time(), w.time_or_null(), w.seldom(n, BIGINTS, str(n)),
               w.pick(["99.95", "999.99", "-999.99", "NaN", NULL]), w.own(tenant), w.time())  # fmt: skip


def _tenant_usage_view(w: World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        day, tenant = divmod(n, len(w.tenants))
        yield (w.tenants[tenant], str(date(1969, 12, 1) + timedelta(days=day)), w.seldom(n, INTEGERS, str(n)),
               w.seldom(n, BIGINTS, "0"), str(n), "0")  # fmt: skip


def _error_hotspots_view(w: World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        _, (job, tenant) = w.jobs.pick(n)
        yield (w.uuid(), job, w.pick(["timeout", "parse", ""]), w.seldom(n, INTEGERS, str(n)), w.pick(TEXTS),
               w.time(), w.time(), w.own(tenant))  # fmt: skip


def _revoked_tokens(w: World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        yield (f"jti-{n}-{w.uuid()}", w.time(), w.text(), w.time(), w.time())


def _blocked_ips(w: World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        tenant = NULL if n % 3 == 0 else w.tenants[w.rank(n, len(w.tenants))]
        yield (w.uuid(), f"2001:db8::{n // 2:x}", w.pick(TEXTS), tenant, w.time(),
               w.time() if n % 2 else NULL, w.time())  # fmt: skip


def _security_events(w: World, rows: int) -> Iterator[Row]:
    for n in range(rows):
        _, (user, tenant) = w.users.pick(n) if n % 4 else (0, (NULL, NULL))
        yield (w.uuid(), "login.failed", w.pick(["low", "high", "critical"]), tenant, user, NULL,
               w.pick(["192.0.2.1", NULL]), w.text(), w.pick(JSONS_OR_NULL), w.pick(BOOLEANS),
               w.time_or_null(), NULL, w.time())  # fmt: skip


@dataclass(frozen=True)
class Table:
    """How to fill a table: since which shape it exists, its share of the rows, what makes them, and its columns."""

    since: str
    share: int
    rows: Callable[[World, int], Iterator[Row]]
    columns: str


#: Parents before children; ``tenants`` and ``tenant_quota_usage`` have one row per tenant instead of a share.
TABLES = {
    "tenants": Table("multi_tenancy", 0, _tenants,
        "id name slug parent_tenant_id tier status quotas config metadata created_at updated_at deleted_at"),
    "users": Table("oldest", 20, _users,
        "id tenant_id email password_hash name role data_residency_region data_retention_days deleted_at "
        "deletion_scheduled_at created_at updated_at"),
    "api_keys": Table("oldest", 15, _api_keys,
        "id user_id tenant_id key_prefix key_hash name scopes rate_limit ip_whitelist revoked_at expires_at "
        "last_used_at created_at updated_at"),
    "jobs": Table("oldest", 25, _jobs,
        "id user_id tenant_id name source_adapter source_config_encrypted target_adapter "
        "target_config_encrypted rules schedule status version created_at updated_at"),
    "executions": Table("oldest", 150, _executions,
        "id job_id tenant_id status started_at completed_at error summary duration_ms created_at"),
    "matches": Table("oldest", 420, _matches,
        "id execution_id job_id tenant_id source_id target_id amount currency confidence matched_at "
        "created_at"),
    "unmatched": Table("oldest", 100, _unmatched,
        "id execution_id job_id tenant_id source_id target_id amount currency reason created_at"),
    "reports": Table("oldest", 25, _reports,
        "id job_id execution_id tenant_id date_range_start date_range_end summary generated_at created_at"),
    "webhooks": Table("oldest", 2, _webhooks,
        "id user_id tenant_id url events secret status created_at updated_at"),
    "webhook_payloads": Table("oldest", 30, _webhook_payloads,
        "id adapter tenant_id payload signature received_at processed processed_at error created_at"),
    "webhook_deliveries": Table("oldest", 38, _webhook_deliveries,
        "id webhook_id url payload status status_code response_body attempts next_retry_at delivered_at "
        "created_at"),
    "webhook_configs": Table("oldest", 1, _webhook_configs,
        "adapter secret signature_algorithm created_at updated_at"),
    "audit_logs": Table("oldest", 80, _audit_logs,
        "id tenant_id event user_id api_key_id ip user_agent method path status_code metadata timestamp"),
    "idempotency_keys": Table("oldest", 20, _idempotency_keys,
        "id user_id tenant_id key response created_at expires_at"),
    "tenant_usage": Table("multi_tenancy", 4, _tenant_usage,
        "id tenant_id metric_type metric_value period_start period_end created_at"),
    "tenant_quota_usage": Table("multi_tenancy", 0, _tenant_quota_usage,
        "tenant_id current_storage_bytes current_concurrent_jobs current_monthly_reconciliations "
        "last_reset_at updated_at"),
    "feature_flags": Table("multi_tenancy", 4, _feature_flags,
        "id name description enabled rollout_percentage tenant_id user_id conditions created_at updated_at "
        "deleted_at"),
    "feature_flag_changes": Table("multi_tenancy", 4, _feature_flag_changes,
        "id feature_flag_id changed_by old_value new_value reason created_at"),
    "event_store": Table("event_sourcing", 60, _event_store,
        "id event_id aggregate_id aggregate_type event_type event_version data metadata tenant_id "
        "created_at"),
    "snapshots": Table("event_sourcing", 5, _snapshots,
        "id aggregate_id aggregate_type snapshot_data snapshot_version event_id tenant_id created_at"),
    "saga_state": Table("event_sourcing", 5, _saga_state,
        "id saga_id saga_type aggregate_id current_step state status error_message retry_count max_retries "
        "next_retry_at timeout_at tenant_id correlation_id created_at updated_at completed_at"),
    "dead_letter_queue": Table("event_sourcing", 5, _dead_letter_queue,
        "id saga_id event_id error_type error_message error_stack payload retry_count max_retries tenant_id "
        "correlation_id created_at resolved_at resolution_notes"),
    "reconciliation_summary": Table("cqrs_projections", 20, _reconciliation_summary,
        "reconciliation_id job_id status total_source_records total_target_records matched_count "
        "unmatched_source_count unmatched_target_count errors_count started_at completed_at duration_ms "
        "accuracy_percentage tenant_id updated_at"),
    "tenant_usage_view": Table("cqrs_projections", 5, _tenant_usage_view,
        "tenant_id date reconciliation_count total_duration_ms success_count failure_count"),
    "error_hotspots_view": Table("cqrs_projections", 5, _error_hotspots_view,
        "reconciliation_id job_id error_type error_count step first_occurred_at last_occurred_at tenant_id"),
    "revoked_tokens": Table("security", 3, _revoked_tokens,
        "jti revoked_at reason expires_at created_at"),
    "blocked_ips": Table("security", 3, _blocked_ips,
        "id ip reason tenant_id blocked_at unblocked_at created_at"),
    "security_events": Table("security", 10, _security_events,
        "id event_type severity tenant_id user_id api_key_id ip user_agent details resolved resolved_at "
        "resolved_by created_at"),
}  # fmt: skip
