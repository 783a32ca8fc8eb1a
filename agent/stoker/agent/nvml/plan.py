"""What one device is asked at one rate: a batch of fields, then the questions left over.

A plan is made when the GPUs are looked for, and learns as it is carried out: what this card or
driver does not have is not asked again, because every call takes the driver's global lock.
"""

from collections.abc import Iterable, Sequence
from ctypes import create_string_buffer

from stoker.agent.driver import (
    DriverError,
    DriverUnavailable,
    FactUnavailable,
    FunctionMissing,
    GpuUnavailable,
    NotSupported,
)
from stoker.agent.nvml.facts import Question, Told
from stoker.agent.nvml.fields import Field, value_of
from stoker.agent.nvml.session import Device, InvalidArgument, Prepared, Session
from stoker.agent.nvml.table import FIELD_VALUE, CMemory, Code

FIELD_VALUES = "nvmlDeviceGetFieldValues"


class FieldRequest:
    """Fields that are asked for in one call, made ready once.

    nvidia-ml-py fills in a request one attribute at a time, which costs more than the driver's
    answer. Where its way to the library is open, a request that was filled in once is copied. It
    holds an error in every place, so that a field which the driver passes over is no zero.
    """

    __slots__ = ("_filled_in", "_session", "_straight", "fields")

    def __init__(self, session: Session, fields: Sequence[Field]) -> None:
        """Take the fields; nothing is asked yet."""
        self.fields = tuple(fields)
        self._session = session
        self._straight = session.straight(FIELD_VALUES)
        self._filled_in = b"".join(
            FIELD_VALUE.pack(field.number, field.scope, 0, 0, 0, Code.UNKNOWN, 0)
            for field in self.fields
        )

    def ask(self, device: Device) -> CMemory:
        """Return the values, field by field; raises DriverError."""
        if self._straight is None:
            numbers = [(field.number, field.scope) for field in self.fields]
            return self._session.ask(device, FIELD_VALUES, device.handle, numbers)
        values = create_string_buffer(self._filled_in, len(self._filled_in))
        self._session.call(
            device, FIELD_VALUES, self._straight, device.handle, len(self.fields), values
        )
        return values


class FieldBatch:
    """Fields of one device that are asked for in one call."""

    def __init__(self, session: Session, device: Device, fields: Iterable[Field]) -> None:
        """Take the fields; which of them this device has, turns out at the first reading."""
        self._session, self._device = session, device
        self._request = FieldRequest(session, list(fields))

    def read(self, told: Told) -> list[Question]:
        """Ask; return the questions that take the place of fields found not to exist."""
        questions: dict[Question, None] = {}
        request, kept = self._request, list(self._request.fields)
        while request.fields:
            lacking = self._ask(request, told)
            if not lacking:
                break
            gone = set(lacking)
            # A field may have an older one, which may be lacking too.
            instead = [field.otherwise for field in lacking]
            older = [field for field in instead if isinstance(field, Field)]
            questions |= {each: None for each in instead if isinstance(each, Question)}
            kept = [*(field for field in kept if field not in gone), *older]
            request = FieldRequest(self._session, older)
        if len(kept) != len(self._request.fields) or questions:
            self._request = FieldRequest(self._session, kept)
        return list(questions)

    def _ask(self, request: FieldRequest, told: Told) -> list[Field]:
        """Take in the values; return the fields that do not exist here."""
        device, fields = self._device, request.fields
        try:
            values = request.ask(device)
        except FunctionMissing:
            return list(fields)
        except (FactUnavailable, InvalidArgument):
            if len(fields) == 1:
                return list(fields)
            # One field that the driver does not know may spoil the call for all of them.
            half = len(fields) // 2
            halves = (fields[:half], fields[half:])
            requests = [FieldRequest(self._session, each) for each in halves]
            return [field for each in requests for field in self._ask(each, told)]
        except (DriverUnavailable, GpuUnavailable):
            raise
        except DriverError as error:
            for field in fields:
                told.fail(field.fact, error)
            return []
        return self._take(values, fields, told)

    def _take(self, values: CMemory, fields: Sequence[Field], told: Told) -> list[Field]:
        lacking: list[Field] = []
        unpacked = FIELD_VALUE.iter_unpack(values)
        for field, (_, _, _, _, value_type, code, raw) in zip(fields, unpacked, strict=True):
            if code == Code.SUCCESS:
                value = value_of(value_type, raw)
                meant = None if value is None else field.meaning(value)
                told.put(field.fact, meant, field.label)
                continue
            if self._session.is_lacking(code):
                lacking.append(field)
                continue
            error = self._session.error(code, FIELD_VALUES, self._device)
            if isinstance(error, DriverUnavailable | GpuUnavailable):
                raise error
            told.fail(field.fact, error)
        return lacking


class Plan:
    """The batches and questions of one device at one rate."""

    def __init__(
        self,
        session: Session,
        device: Device,
        batches: Iterable[FieldBatch],
        questions: Iterable[Question],
    ) -> None:
        """Take what is asked."""
        self._session, self._device = session, device
        self._batches = list(batches)
        self._asked = [Prepared(session, device, question) for question in questions]

    def read(self, told: Told) -> None:
        """Ask everything; raises DriverUnavailable and GpuUnavailable."""
        for batch in self._batches:
            self._add(batch.read(told))
        gone: list[Prepared] = []
        for asked in self._asked:
            try:
                answer = asked.answer()
            except NotSupported:
                gone.append(asked)
            except (DriverUnavailable, GpuUnavailable):
                raise
            except DriverError as error:
                for fact in asked.question.facts:
                    told.fail(fact, error)
            else:
                asked.question.tell(told, answer)
        if gone:
            self._asked = [asked for asked in self._asked if asked not in gone]

    def _add(self, questions: Sequence[Question]) -> None:
        known = {asked.question for asked in self._asked}
        self._asked += [
            Prepared(self._session, self._device, question)
            for question in questions
            if question not in known
        ]
