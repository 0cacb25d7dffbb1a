from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AboutRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AboutReply(_message.Message):
    __slots__ = ("model", "guarded", "waiting", "running")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    GUARDED_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    model: Model
    guarded: bool
    waiting: int
    running: int
    def __init__(self, model: _Optional[_Union[Model, _Mapping]] = ..., guarded: _Optional[bool] = ..., waiting: _Optional[int] = ..., running: _Optional[int] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("version", "study", "study_id", "round", "adapter_sha256", "base", "mode", "release_epsilon", "delta", "label")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STUDY_FIELD_NUMBER: _ClassVar[int]
    STUDY_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_SHA256_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    RELEASE_EPSILON_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    version: int
    study: str
    study_id: str
    round: int
    adapter_sha256: str
    base: str
    mode: str
    release_epsilon: float
    delta: float
    label: str
    def __init__(self, version: _Optional[int] = ..., study: _Optional[str] = ..., study_id: _Optional[str] = ..., round: _Optional[int] = ..., adapter_sha256: _Optional[str] = ..., base: _Optional[str] = ..., mode: _Optional[str] = ..., release_epsilon: _Optional[float] = ..., delta: _Optional[float] = ..., label: _Optional[str] = ...) -> None: ...

class DraftRequest(_message.Message):
    __slots__ = ("image", "indication", "question", "max_new_tokens")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    INDICATION_FIELD_NUMBER: _ClassVar[int]
    QUESTION_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    image: bytes
    indication: str
    question: str
    max_new_tokens: int
    def __init__(self, image: _Optional[bytes] = ..., indication: _Optional[str] = ..., question: _Optional[str] = ..., max_new_tokens: _Optional[int] = ...) -> None: ...

class DraftEvent(_message.Message):
    __slots__ = ("decision", "token", "draft")
    DECISION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    DRAFT_FIELD_NUMBER: _ClassVar[int]
    decision: Decision
    token: Token
    draft: Draft
    def __init__(self, decision: _Optional[_Union[Decision, _Mapping]] = ..., token: _Optional[_Union[Token, _Mapping]] = ..., draft: _Optional[_Union[Draft, _Mapping]] = ...) -> None: ...

class Decision(_message.Message):
    __slots__ = ("refused", "code", "reason", "reason_zh", "ood_score", "ood_threshold")
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    REASON_ZH_FIELD_NUMBER: _ClassVar[int]
    OOD_SCORE_FIELD_NUMBER: _ClassVar[int]
    OOD_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    refused: bool
    code: str
    reason: str
    reason_zh: str
    ood_score: float
    ood_threshold: float
    def __init__(self, refused: _Optional[bool] = ..., code: _Optional[str] = ..., reason: _Optional[str] = ..., reason_zh: _Optional[str] = ..., ood_score: _Optional[float] = ..., ood_threshold: _Optional[float] = ...) -> None: ...

class Token(_message.Message):
    __slots__ = ("text", "token_id", "logprob")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_id: int
    logprob: float
    def __init__(self, text: _Optional[str] = ..., token_id: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class Sentence(_message.Message):
    __slots__ = ("text", "start", "end", "uncertainty", "least_probability")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    UNCERTAINTY_FIELD_NUMBER: _ClassVar[int]
    LEAST_PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    text: str
    start: int
    end: int
    uncertainty: float
    least_probability: float
    def __init__(self, text: _Optional[str] = ..., start: _Optional[int] = ..., end: _Optional[int] = ..., uncertainty: _Optional[float] = ..., least_probability: _Optional[float] = ...) -> None: ...

class Draft(_message.Message):
    __slots__ = ("id", "model", "decision", "text", "sentences", "finish", "cut", "seconds", "picture_sha256", "access_record")
    ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DECISION_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    SENTENCES_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    PICTURE_SHA256_FIELD_NUMBER: _ClassVar[int]
    ACCESS_RECORD_FIELD_NUMBER: _ClassVar[int]
    id: str
    model: Model
    decision: Decision
    text: str
    sentences: _containers.RepeatedCompositeFieldContainer[Sentence]
    finish: str
    cut: bool
    seconds: float
    picture_sha256: str
    access_record: str
    def __init__(self, id: _Optional[str] = ..., model: _Optional[_Union[Model, _Mapping]] = ..., decision: _Optional[_Union[Decision, _Mapping]] = ..., text: _Optional[str] = ..., sentences: _Optional[_Iterable[_Union[Sentence, _Mapping]]] = ..., finish: _Optional[str] = ..., cut: _Optional[bool] = ..., seconds: _Optional[float] = ..., picture_sha256: _Optional[str] = ..., access_record: _Optional[str] = ...) -> None: ...
