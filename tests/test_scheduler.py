"""The scheduler: who gets a row, a turn, a place in the queue, a part of the budget."""

from collections import Counter

import pytest
from chapter_code import from_chapter
from serving_helpers import new_request

from qwen_analog import scheduler
from qwen_analog.scheduler import Group, QueueFull, Scheduler, SequenceState


def job(number, client="", group=None, unread=0):
    """A sequence of a group, or of one of its own."""
    group = Group(client, 1, print) if group is None else group
    prompt = [1] * (unread + 1)
    return SequenceState(new_request(prompt, 5), number, 0, group, None, None)


def test_who_gets_a_row():
    large = Group("a", 4, print)
    a = [job(i, "a", large) for i in range(4)]
    assert scheduler.next_for_a_row(a, []) == (a[0], None)
    assert scheduler.next_for_a_row(a[2:], a[:2]) == (
        a[2],
        None,
    )  # nobody else waits: nothing is taken
    other = job(9, "a")
    assert scheduler.next_for_a_row([a[3], other], a[:3]) == (
        other,
        a[2],
    )  # the latest of the largest request
    mine = [job(i, "b") for i in range(10, 13)]  # another client, request by request
    assert scheduler.next_for_a_row([*mine, other], a[:2]) == (mine[0], a[1])
    assert scheduler.next_for_a_row([mine[2]], [*a[:2], *mine[:2]]) == (
        mine[2],
        None,
    )  # it holds as many already
    assert scheduler.next_for_a_row([other, mine[2]], [a[0], *mine[:2]]) == (
        other,
        None,
    )


def test_who_has_no_row_gives_none_back():
    freed = []
    table = Scheduler(2, 64, freed.append)
    first, second, third = jobs = [job(i) for i in range(3)]
    table.add(jobs)
    table.schedule()
    with pytest.raises(ValueError, match="request 2 has no row to give back"):
        table.release(third)
    table.release(first)
    with pytest.raises(ValueError, match="request 0 has no row"):
        table.release(first)
    assert table.rows == [None, second] and freed == [0]


def test_whose_turn_it_is():
    def writing(number, turn, client="a", group=None):
        made = job(number, client, group)
        made.started, made.turn = True, turn
        return made

    short, long, longest = (
        writing(1, scheduler.TURN - 1),
        writing(2, scheduler.TURN),
        writing(3, scheduler.TURN + 1),
    )
    new, later = job(8, "a"), job(9, "a")
    assert scheduler.next_turn([later, new], [short, long, longest]) == (new, longest)
    assert (
        scheduler.next_turn([new], [short]) is None
        and scheduler.next_turn([longest], [long]) is None
    )
    assert (
        scheduler.next_turn([new, job(10, "b")], [long, longest])[0].group.client == "b"
    )
    assert scheduler.next_turn([new], [short, long, writing(4, 99, "b")]) == (
        new,
        long,
    )  # its client has two rows and b one
    two = Group("a", 3, print)
    of_two = [writing(4, 99, "a", two), writing(5, 99, "a", two)]
    turn = scheduler.next_turn([job(11, "a", two)], [*of_two, writing(6, 100, "a")])
    assert turn[1] in of_two


def test_a_short_prompt_does_not_wait_for_long_ones():
    share = lambda *left: [
        size
        for _, size in scheduler.share_budget(
            [job(i, unread=n) for i, n in enumerate(left)], 64
        )
    ]
    assert (
        share(1000) == [64]
        and share(1000, 10) == [54, 10]
        and share(1000, 900, 5) == [32, 27, 5]
        and share(3, 4) == [3, 4]
    )
    assert scheduler.share_budget([job(0), job(1, unread=100)], 1)[0][1] == 1


def test_whose_places_in_a_full_queue():
    def full(*groups):
        """Waiting jobs of (client, number) for each group."""
        jobs = []
        for number, (client, size) in enumerate(groups):
            group = Group(client, size, print)
            group.number = number
            jobs += [job(len(jobs) + i, client, group) for i in range(size)]
        return jobs

    lose = lambda waiting, number, client: {
        job.group.number for job in scheduler.whose_places(waiting, number, client)
    }
    assert lose(full(("a", 1), ("a", 1), ("b", 1)), 1, "c") == {
        1
    }  # the latest of the client with the most
    assert (
        lose(full(("a", 1), ("a", 1), ("b", 1)), 1, "b") == set()
    )  # which would then have as many
    assert lose(full(("a", 8), ("a", 1)), 1, "a") == {
        0
    }  # of one client: much larger requests
    assert lose(full(("a", 2), ("a", 1)), 1, "a") == set()
    assert (
        lose(full(("a", 8))[1:], 1, "b") == set()
    )  # one of its answers is being written


def test_a_queue_says_that_it_is_full_or_has_too_little_room():
    queue = Scheduler(1, 4)
    queue.add([job(0)])
    large = Group("", 4, print)
    with pytest.raises(QueueFull, match="has no room for 4: of its 4 places, 1 are"):
        queue.add([job(i, group=large) for i in range(1, 5)])
    queue.add([job(i) for i in range(1, 4)])
    with pytest.raises(QueueFull, match="the queue is full: of its 4 places, 4 are"):
        queue.add([job(4)])


def answers_of(lengths, client, first):
    """Sequences of one group that wait to write answers of these lengths."""
    group = Group(client, len(lengths), print)
    return [
        SequenceState(new_request([1], size), first + i, i, group, None, None)
        for i, size in enumerate(lengths)
    ]


def steps_until_served(num_rows, *arrivals):
    """Let clients come at their steps with answers of some lengths, until all are done.

    Returns client -> steps from its coming to its last token, and how many times a row
    changed hands.
    """
    table, todo, asked = Scheduler(num_rows, 64), list(arrivals), {}
    waits, step, changes = {}, 0, 0
    while todo or table.running or table.waiting:
        while todo and todo[0][0] == step:
            asked[todo[0][1]] = step
            table.add(answers_of(todo[0][2], todo[0][1], 100 * len(asked)))
            todo.pop(0)
        before = table.running
        table.schedule()
        changes += sum(s in table.waiting for s in before)
        step += 1
        for sequence in table.running:
            sequence.written.append(0)
            sequence.turn += 1
            if len(sequence.written) == sequence.request.max_tokens:
                waits[sequence.group.client] = step - asked[sequence.group.client]
                table.release(sequence)
        assert step < 5000
    return waits, changes


def check_fairness():
    waits, _ = steps_until_served(4, (0, "a", [60] * 8), (3, "b", [6]))
    assert waits["b"] <= 8 and waits["a"] <= 130
    waits, changes = steps_until_served(3, (0, "a", [20] * 3), (1, "b", [20] * 3))
    assert changes <= 2 and max(waits.values()) <= 41
    long = [(0, name, [500]) for name in "abcd"]
    waits, _ = steps_until_served(4, *long, (3, "e", [6]))
    assert waits["e"] <= scheduler.TURN + 8


def test_fairness():
    check_fairness()


def chapters_rules():
    """The rules of the chapter, its cells and its cases."""
    names = {}
    for beginning in (
        "@dataclass(eq=False)  # two jobs",
        "def give_row(",
        "def write(",
        "def simulate(",
        "def small_case(",
        "def next_job(",
        "def row_to_take(",
        "def fair_shares(",
        "def long_answers_and(",
        "def rows_and_turns(",
    ):
        names |= from_chapter("*_scheduling.ipynb", beginning, names)
    return names


def shipped_plan(num_rows, arrivals):
    """The jobs in the rows of each step, as `Scheduler` places them."""
    table, jobs, plan, step = Scheduler(num_rows, 64), {}, [], 0
    while arrivals or table.running or table.waiting:
        for job in arrivals.pop(step, []):
            (sequence,) = answers_of([job.left], job.client, len(jobs))
            jobs[sequence] = job
            table.add([sequence])
        table.schedule()
        plan.append([jobs.get(sequence) for sequence in table.rows])
        for sequence in table.running:
            sequence.written.append(0)
            sequence.turn += 1
            if len(sequence.written) == sequence.request.max_tokens:
                table.release(sequence)
        step += 1
    return plan


def four_long_answers(Job):
    return {0: [Job(client, 500) for client in "ABCD"], 3: [Job("e", 6)]}


@pytest.mark.parametrize(("case", "rows"), [("small", 2), ("four long", 4)])
def test_the_chapters_rule_makes_the_same_plan(case, rows):
    names = chapters_rules()
    cases = {
        "small": names["small_case"],
        "four long": lambda: four_long_answers(names["Job"]),
    }
    plain = names["simulate"](names["rows_and_turns"], rows, cases[case]())
    shipped = shipped_plan(rows, cases[case]())
    look = lambda plan: [[j and (j.client, j.number) for j in jobs] for jobs in plan]
    assert look(plain) == look(shipped)


def first_come(waiting, holders, num_rows, most_interrupted):
    return waiting[0], None


CALLS = []


def from_whom_has_one_more(waiting, holders, num_rows, most_interrupted):
    CALLS.append(len(waiting))
    assert len(CALLS) < 1000, "the rows change hands for ever"
    held = Counter(s.group.client for s in holders)
    chosen = min(waiting, key=lambda s: (held[s.group.client], s.number))
    most = [s for s in holders if held[s.group.client] > held[chosen.group.client]]
    loser = max(most, key=lambda s: s.number, default=None)
    return chosen, loser if len(holders) == num_rows else None


def nobody_loses_a_row(waiting, holders, num_rows, most_interrupted):
    return scheduler.next_for_a_row(waiting, holders)[0], None


def no_turns(waiting, holders, num_rows, most_interrupted):
    chosen, loser = scheduler.next_for_a_row(waiting, holders)
    return chosen, loser if len(holders) == num_rows else None


@pytest.mark.mutant
@pytest.mark.parametrize(
    "rule", [first_come, from_whom_has_one_more, nobody_loses_a_row, no_turns]
)
def test_fairness_kills(rule, monkeypatch):
    monkeypatch.setattr(scheduler, "who_changes", rule)
    with pytest.raises(AssertionError):
        check_fairness()
