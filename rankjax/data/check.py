"""check: what in a log ruins a study, found before anything is trained.

A leak makes every architecture look good, a broken cut every comparison worthless; both show in
counts over the log. What each kind looks for, and from which numbers on it rings, stands in
`check_inputs`, `check_time`, `check_drift` and `check_requests`.
"""

from rankjax.data import (
    check_drift,
    check_inputs,
    check_requests,
    check_time,
    event_log,
    finding,
    samples,
)

Finding = finding.Finding
CHECKS = {
    check.__name__: check
    for check in (
        check_inputs.feature_predicts_label,
        check_time.event_from_the_future,
        check_time.seen_before_birth,
        check_inputs.unseen_in_evaluation,
        check_requests.duplicated_impressions,
        check_drift.label_changes_over_time,
        check_requests.split_shares_requests,
        check_requests.position_encodes_click,
        check_requests.one_class,
        check_requests.no_request_with_both,
    )
}
KINDS = tuple(CHECKS)


def check(log: event_log.EventLog) -> list[Finding]:
    """Everything that was found: errors first, then in the order of KINDS. An empty list is good.

    Passes over the log in chunks; holds a few arrays of the log's length at a time.
    `dataclasses.asdict` of a finding has JSON types only.
    Raises ValueError where a derived feature of the schema cannot be computed.
    """
    samples.check_derived(log)
    found = [x for kind in KINDS for x in CHECKS[kind](log)]
    return sorted(found, key=lambda x: x.severity != "error")


def text(findings: list[Finding]) -> str:
    """The findings for a terminal."""
    if not findings:
        return f"nothing found; looked for {', '.join(KINDS)}"
    errors = sum(x.severity == "error" for x in findings)
    lines = [f"{errors} error(s), {len(findings) - errors} warning(s)"]
    for x in findings:
        lines += ["", f"{x.severity}: {x.kind} in {x.where}", f"  {x.evidence}"]
        lines.append(f"  {x.advice}")
    return "\n".join(lines)
