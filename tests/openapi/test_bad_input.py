"""Every bad request that the document lets us think of is answered 400 with a reason, and changes nothing."""

import pytest
from bodies import Maker
from document import operations

OPERATIONS = operations()
WITH_BODY = [operation for operation in OPERATIONS if operation.schema]
WITH_ID = [operation for operation in OPERATIONS if operation.parameters]
WITH_STATE = [operation for operation in OPERATIONS if len(operation.states) == 1]
BAD_IDS = ("", "a-b", "a b", "a.b", "%21", "a?b")


def assert_refused(machine, requests):
    """Sends bad requests: (method, path, body, what is bad, words to be answered)."""
    found = []
    before = machine.config()
    for method, path, body, reason, words in requests:
        answer = machine.request(method, path, body)
        machine.check_alive()
        what = f"{method} {path} {str(body)[:300]} ({reason}): {answer.status_code} {answer.text}"
        if answer.status_code != 400:
            found.append(f"not refused: {what}")
        elif set(answer.json()) != {"fault_message"} or not answer.json()["fault_message"]:
            found.append(f"no reason given: {what}")
        elif missing := [word for word in words if word not in answer.json()["fault_message"]]:
            found.append(f"not said: {missing}: {what}")
        after = machine.config()
        if after != before:
            found.append(f"changed {before} to {after}: {what}")
            before = after
    if found:
        pytest.fail("\n".join(found), pytrace=False)


@pytest.mark.parametrize("operation", WITH_BODY, ids=str)
def test_refuses_bad_bodies(machine, operation):
    maker = Maker(operation, machine.folder)
    path = operation.url(maker.good())
    requests = [(operation.method, path, bad.text, bad.reason, bad.words) for bad in maker.bad()]
    assert_refused(machine, requests)


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_refuses_bodies_where_none_may_be_and_none_where_one_must_be(machine, operation):
    if operation.schema is None:
        bad = [(b"{}", "a body")]
    else:
        bad = [(None, "no body")] if operation.body_required else []
    requests = [(operation.method, operation.url(), body, reason, ("request",)) for body, reason in bad]
    assert_refused(machine, requests)


@pytest.mark.parametrize("operation", WITH_ID, ids=str)
def test_refuses_bad_ids(machine, operation):
    maker = Maker(operation, machine.folder)
    body = maker.good() if operation.schema else None
    ids = [{name: bad for name in operation.parameters} for bad in BAD_IDS]
    requests = [(operation.method, operation.url(body, **bad), body, "a bad id", ("ID",)) for bad in ids]
    if body and set(operation.parameters) <= set(body):
        other = {name: "other" for name in operation.parameters}
        requests.append((operation.method, operation.url(body, **other), body, "another id", ("id",)))
    assert_refused(machine, requests)


@pytest.mark.parametrize("operation", WITH_STATE, ids=str)
def test_refuses_requests_in_the_wrong_state(machine, state, operation):
    maker = Maker(operation, machine.folder)
    body = maker.good() if operation.schema else None
    wrong = [] if state in operation.states else [f"not supported {state} starting"]
    requests = [(operation.method, operation.url(body), body, "the wrong state", (words,)) for words in wrong]
    assert_refused(machine, requests)


@pytest.mark.parametrize("operation", [operation for operation in WITH_BODY if operation.configures], ids=str)
def test_takes_unknown_fields_only_where_the_document_does(new_machine, operation):
    scratch = new_machine("scratch")
    for body in Maker(operation, scratch.folder).tolerant():
        machine = new_machine("tolerant", configured=True, but=operation)
        machine.do(operation.method, operation.url(body), Maker(operation, machine.folder).with_files(body))
