"""Every error that Millrace raises on purpose. A message says what is wrong, with the value, and what to do.

MillraceError
├── SettingsError          a setting or an application's declaration is wrong
├── StackError             a part of the embedded stack can't start, or answers no more
├── BackupError            a backup can't be made, trusted or restored
├── LakehouseError         a table can't be read or written as asked
│   ├── ConflictError      somebody else committed first; read again and retry
│   ├── FeedGone           the changes that are asked for were removed
│   └── AccessRefused      storage does not let this identity do that
├── SourceError            a document or event source can't be read
├── SampleError            no sample of prod can be published, or staging can't have it
├── RetrievalError         no index build, or one that can't be trusted
│   └── CanaryError        a new index build finds less than the one before
├── ReleaseError           a release can't be packaged, registered or loaded
├── EngineError            a generator can't be loaded or doesn't answer
├── ServingError           a request can't be answered as asked
├── ApiKeyError            an API key can't be made, found or changed
│   └── KeysAway           the database of API keys does not answer
├── TrainingError          a training set or a fine-tune is unusable
│   └── OutOfMemory        a training process needs more memory than there is
├── PromptError            a prompt version isn't there, or a study of prompts can't be held
├── BatchError             a table of questions can't be used, or can't be answered
├── CostError              a cost can't be planned from what is known
├── GateRefusal            a candidate did not pass; the message names the criterion
├── AccessError            who may do what can't be read, changed or tried
├── ApprovalError          who answered may not decide this
├── ErasureError           what is known of a user can't be erased yet
└── AuditError             the audit trail is not whole, or an entry can't go into it
"""


class MillraceError(Exception):
    """Root of the tree above."""


class SettingsError(MillraceError):
    """A setting or an application's declaration is wrong."""


class StackError(MillraceError):
    """A part of the embedded stack can't start, or answers no more."""


class BackupError(MillraceError):
    """A backup can't be made, trusted or restored."""


class LakehouseError(MillraceError):
    """A table can't be read or written as asked."""


class ConflictError(LakehouseError):
    """Somebody else committed first; read again and retry."""


class FeedGone(LakehouseError):
    """The changes that are asked for were removed; start again from the whole table."""


class AccessRefused(LakehouseError):
    """Storage does not let this identity do that; the message names identity, action and table."""


class SourceError(MillraceError):
    """A document or event source can't be read."""


class SampleError(MillraceError):
    """No sample of prod can be published, or staging can't have it."""


class RetrievalError(MillraceError):
    """No index build, or one that can't be trusted."""


class BuildLost(RetrievalError):
    """An index build that isn't there any more, isn't whole, or is of another format: it has to be made again."""


class CanaryError(RetrievalError):
    """A new index build finds less than the one before."""


class ReleaseError(MillraceError):
    """A release can't be packaged, registered or loaded."""


class EngineError(MillraceError):
    """A generator can't be loaded or doesn't answer."""


class ServingError(MillraceError):
    """A request can't be answered as asked."""


class ApiKeyError(MillraceError):
    """An API key can't be made, found or changed."""


class KeysAway(ApiKeyError):
    """The database of API keys does not answer."""


class TrainingError(MillraceError):
    """A training set or a fine-tune is unusable."""


class OutOfMemory(TrainingError):
    """A training process needs more memory than there is."""


class PromptError(MillraceError):
    """A prompt version isn't there, or a study of prompts can't be held."""


class BatchError(MillraceError):
    """A table of questions can't be used, or can't be answered."""


class CostError(MillraceError):
    """A cost can't be planned from what is known."""


class GateRefusal(MillraceError):
    """A candidate did not pass the gate; the message names the criterion, by how much, and examples."""


class AccessError(MillraceError):
    """Who may do what can't be read, changed or tried."""


class ApprovalError(MillraceError):
    """Who answered may not decide this."""


class ErasureError(MillraceError):
    """What is known of a user can't be erased yet."""


class AuditError(MillraceError):
    """The audit trail is not whole, or an entry can't go into it."""
