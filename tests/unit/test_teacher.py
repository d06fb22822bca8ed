"""The teacher's average against explicit means."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from streamlearn.learn.teacher import TeacherAverage, buffer_slots, make_teacher

TAKEN, SKIPPED = torch.tensor(False), torch.tensor(True)


class Net(nn.Module):
    """A weight, a float buffer, an integer buffer and a mask with infinities."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.register_buffer("statistic", torch.tensor([0.0]))
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))


def students(*values: float):
    """A network that has these values one after the other."""
    net = Net()
    for value in values:
        with torch.no_grad():
            net.weight.fill_(value)
            net.statistic.fill_(value)
            net.seen.add_(1)
        yield net


class TestMakeTeacher:
    def test_is_a_copy_that_takes_no_gradient(self):
        """Equal at first, apart from then on, in eval mode."""
        student = Net()

        teacher = make_teacher(student)

        assert torch.equal(teacher.weight, student.weight)
        assert teacher.weight.data_ptr() != student.weight.data_ptr()
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        assert not teacher.training
        assert student.weight.requires_grad


class TestTeacherAverage:
    @pytest.mark.parametrize("host_may_ask", [True, False])
    def test_of_weights_is_the_plain_mean_of_all_students_at_first(self, host_may_ask):
        """Before the window fills, the teacher is the mean of every student so far, the initial one included."""
        student = Net()
        teacher = make_teacher(student)
        average = TeacherAverage(teacher, student)

        for step, value in enumerate((4.0, 7.0, 10.0), start=1):
            with torch.no_grad():
                student.weight.fill_(value)
            average.update(step, alpha=0.99) if host_may_ask else average.update_unless(TAKEN, step, alpha=0.99)

        expected = torch.tensor([(1 + 4 + 7 + 10) / 4, (2 + 4 + 7 + 10) / 4])
        torch.testing.assert_close(teacher.weight.detach(), expected)

    def test_of_buffers_is_the_mean_without_the_first(self):
        """Zeros and ones from before the first step describe no data."""
        student = Net()
        teacher = make_teacher(student)
        average = TeacherAverage(teacher, student)

        for step, value in enumerate((4.0, 7.0), start=1):
            student.statistic.fill_(value)
            average.update(step, alpha=0.99)

        torch.testing.assert_close(teacher.statistic, torch.tensor([5.5]))

    def test_forgets_by_alpha_once_the_window_is_full(self):
        """The plain form: alpha theta' + (1 - alpha) theta."""
        student = Net()
        teacher = make_teacher(student)
        average = TeacherAverage(teacher, student)
        with torch.no_grad():
            student.weight.fill_(11.0)

        average.update(1000, alpha=0.9)

        torch.testing.assert_close(teacher.weight.detach(), torch.tensor([2.0, 2.9]))

    def test_copies_whole_numbers_and_leaves_infinities_whole(self):
        """A count is not averaged, and inf - inf does not make the mask NaN."""
        student = Net()
        teacher = make_teacher(student)
        average = TeacherAverage(teacher, student)
        student.seen.fill_(5)

        average.update(3, alpha=0.9)

        assert teacher.seen.item() == 5
        assert teacher.mask.tolist() == [0.0, -torch.inf]

    def test_follows_a_buffer_that_the_network_replaces(self):
        """`self.statistic = …` in a forward pass assigns a new tensor, and the average uses it."""
        student = Net()
        teacher = make_teacher(student)
        average = TeacherAverage(teacher, student)
        student.statistic = student.statistic + 8.0

        average.update(1, alpha=0.9)

        assert teacher.statistic.item() == 8.0

    def test_is_untouched_by_a_skipped_step(self):
        """The GPU path adds exactly zero."""
        student = Net()
        teacher = make_teacher(student)
        average = TeacherAverage(teacher, student)
        with torch.no_grad():
            student.weight.fill_(123.0)

        average.update_unless(SKIPPED, 1, alpha=0.9)

        assert teacher.weight.tolist() == [1.0, 2.0]


def test_a_buffer_that_two_layers_share_is_listed_once():
    """Otherwise it would be averaged twice per step."""
    net = nn.Sequential(Net(), Net())
    net[1].statistic = net[0].statistic

    assert sorted(name for _, name in buffer_slots(net)).count("statistic") == 1
