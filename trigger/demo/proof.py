"""Whether what came back is what the bank had: clone against books, transaction by transaction; pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trigger.demo.bank import Accident, Books


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was found in the clone and in production after the restore."""

    clone: Books
    production: Books
    accident_in_clone: str
    """What the clone's server knows of the accident's transaction."""
    accident_in_production: str
    last_transfer_in_clone: str
    """What the clone's server knows of the last transfer before the accident."""
    commits_made: int
    """By the bank, by its own count."""
    commits_recorded: Mapping[str, int]
    """In Trigpoint's catalog, by outcome."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that must hold, whether it does, and what was seen."""

    claim: str
    held: bool
    seen: str


def checks(accident: Accident, evidence: Evidence) -> tuple[Check, ...]:
    """Give everything that must hold for the clone to be the bank as it was right before the accident."""
    before, clone, production = accident.books_before, evidence.clone, evidence.production
    differing = sum(
        before.balances.get(n) != clone.balances.get(n) for n in before.balances.keys() | clone.balances.keys()
    )
    off = sum(clone.balances[n] != clone.by_ledger[n] for n in clone.balances)
    recorded = sum(evidence.commits_recorded.values())
    return (
        Check(
            "every commit of the bank has exactly one outcome in the catalog",
            recorded == evidence.commits_made and not evidence.commits_recorded.get("missed"),
            f"{evidence.commits_made} commits, {recorded} recorded: "
            + ", ".join(f"{count} {outcome}" for outcome, count in evidence.commits_recorded.items() if count),
        ),
        Check(
            "production has lost its accounts, for good",
            not production.balances and evidence.accident_in_production == "committed",
            f"{len(production.balances)} accounts; transaction {accident.xid} is {evidence.accident_in_production}",
        ),
        Check(
            "every balance is back",
            not differing and len(clone.balances) == accident.rows,
            f"{len(clone.balances)} accounts, {differing} differ from the books taken right before the accident",
        ),
        Check(
            "every balance is what the bank's own ledger says",
            not off and bool(clone.balances),
            f"{len(clone.ledger)} transfers, {off} balances do not follow from them",
        ),
        Check(
            "no money was made or lost",
            clone.total == before.total,
            f"{_money(before.total)} before, {_money(clone.total)} in the clone",
        ),
        Check(
            "every transfer before the accident is there, the last one too, and none besides",
            clone.ledger == before.ledger and evidence.last_transfer_in_clone == "committed",
            f"{len(before.ledger - clone.ledger)} missing, {len(clone.ledger - before.ledger)} too many; "
            f"transaction {accident.last_transfer_xid} is {evidence.last_transfer_in_clone}",
        ),
        Check(
            "the accident is not there",
            evidence.accident_in_clone in ("aborted", "unknown"),
            f"transaction {accident.xid} is {evidence.accident_in_clone} in the clone",
        ),
        Check(
            "nothing that came after it is there",
            clone.complaints == before.complaints and production.complaints > before.complaints,
            f"{production.complaints} complaints in production, {clone.complaints} in the clone",
        ),
    )


def _money(cents: int) -> str:
    return f"{cents // 100:,}.{cents % 100:02d}"
