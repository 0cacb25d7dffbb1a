"""Every error that FedRad raises by name.

A message says what was expected and what was got, and names the file, field or site. It never holds
patient data, report text, keys or update values. Programs turn a `FedRadError` into one line on stderr
and exit code 1; any other exception is a defect.
"""

from __future__ import annotations


class FedRadError(Exception):
    """Base of all named errors; `code` is the class name, stable for logs, metrics and tests."""

    @property
    def code(self) -> str:
        return type(self).__name__


# --- values and files -------------------------------------------------------------------------------------


class NotCanonical(FedRadError):
    """Bytes are not the one canonical encoding of what they say."""


class BodyTooLarge(FedRadError):
    """A body, file or field is over its size cap."""


class ManifestInvalid(FedRadError):
    """A study manifest has an unknown or missing key, a wrong unit or an impossible combination."""


# --- prepared site data (client/data) ---------------------------------------------------------------------


class DatasetInvalid(FedRadError):
    """A prepared data folder breaks the contract of `pairs.jsonl`, `card.json` or `checksums.json`."""


class PairInvalid(DatasetInvalid):
    """A line of `pairs.jsonl` has an unknown, missing or mistyped field."""


class StudyDuplicated(DatasetInvalid):
    """A study occurs twice in one prepared data folder."""


class ImagePathEscapes(DatasetInvalid):
    """An image path is absolute, leaves its folder or passes through a symbolic link."""


class ImageMissing(DatasetInvalid):
    """An image that a pair names is not in the prepared data folder."""


class SplitLeaks(DatasetInvalid):
    """One patient occurs in two splits."""


class DatasetExists(DatasetInvalid):
    """The output folder already holds something that this command did not make or may not replace."""


# --- identity and messages --------------------------------------------------------------------------------


class KeyFileInvalid(FedRadError):
    """A key file is missing, unreadable, of another kind, or readable by others."""


class SignatureInvalid(FedRadError):
    """A signature does not verify under the pinned key."""


class EnvelopeMalformed(FedRadError):
    """Bytes are not a protocol message: framing, header fields or lengths are wrong."""


class UnknownSender(FedRadError):
    """A message comes from a sender that the study's manifest does not pin."""


class WrongRecipient(FedRadError):
    """A message is addressed to somebody else."""


class WrongStudy(FedRadError):
    """A message belongs to another study."""


class WrongRound(FedRadError):
    """A message belongs to another round or attempt."""


class WrongStage(FedRadError):
    """A message of one stage arrives where another is due."""


class PreviousStateMismatch(FedRadError):
    """A message builds on a state that this side has not seen."""


class MessageReplayed(FedRadError):
    """A message's nonce was seen before, or a reply answers another request."""


class BodyHashMismatch(FedRadError):
    """A body is not the one that the signed header names."""


# --- model and adapter ------------------------------------------------------------------------------------


class BaseInvalid(FedRadError):
    """A base model directory is incomplete, of another architecture or has an unlisted file."""


class BaseHashMismatch(FedRadError):
    """A file of the base model differs from the one the manifest pins."""


class StepTooLarge(FedRadError):
    """The global adapter moved further in a round than the manifest allows."""


class SumOutOfRange(FedRadError):
    """A round's sum is larger than honest sites' clipped gradients and noise can be."""


class PublicSetInvalid(FedRadError):
    """The operator's public set or base is missing, or is not what the manifest names."""


class AdapterInvalid(FedRadError):
    """An adapter has a tensor, name, shape, type or value outside the manifest's list."""


# --- the site agent's refusals ----------------------------------------------------------------------------


class StudyUnknown(FedRadError):
    """The agent holds no manifest with this hash."""


class StudyNotApproved(FedRadError):
    """The study is not signed by the operator, or this site has not approved it."""


class RoundAlreadyServed(FedRadError):
    """Another request was already served for this study, round and attempt."""


class CohortTooSmall(FedRadError):
    """A round's cohort is below the manifest's floor, or not the one it has to be."""


class CohortRepeatsSite(CohortTooSmall):
    """A round's cohort names a site twice."""


class SiteNotInStudy(CohortTooSmall):
    """A round's cohort names a site that the manifest does not."""


class RoundLimitReached(FedRadError):
    """The manifest allows no further round or attempt."""


class DataInsufficient(FedRadError):
    """A site's prepared data cannot serve the study."""


class DeadlinePassed(FedRadError):
    """A request reached the agent after its deadline."""


class PeerRefused(FedRadError):
    """A process of another user or group connected to the agent's socket, or one more than may."""


class PeerTooSlow(FedRadError):
    """A process on the agent's socket sends nothing, or so slowly that it holds the place of others."""


class TooFrequent(FedRadError):
    """A process on the agent's socket, or a site at the server, asks more often than it may."""


class SocketInvalid(FedRadError):
    """The agent's socket lies where others can write or its group cannot enter, or cannot be made."""


class BaseWritable(FedRadError):
    """A base model can be changed by others than the agent's own user."""


class AgentUnavailable(FedRadError):
    """The site agent cannot be reached on its socket."""


# --- the server's rounds ----------------------------------------------------------------------------------


class RoundFailed(FedRadError):
    """A round ended below its floor and the manifest says to end, or its attempts are used up."""


class CheckpointInvalid(FedRadError):
    """A checkpoint of the server does not match its record or its study."""


class ReleaseInvalid(FedRadError):
    """A release directory is incomplete, altered, or not meant to be run."""


class RunDirectoryBusy(FedRadError):
    """Another process works on this run directory, or it belongs to another study."""


# --- privacy ----------------------------------------------------------------------------------------------


class ModelUntreatable(FedRadError):
    """A model has a trainable part whose per-patient gradient cannot be computed exactly."""


class PatientGradientMisuse(FedRadError):
    """The per-patient gradient engine was called out of order or with a wrong patient map."""


class SamplingInvalid(FedRadError):
    """A sampling rate, seed, order of patients or number of studies is out of range."""


class GeneratorReused(FedRadError):
    """Randomness was asked twice for one purpose from one generator."""


class TestRandomness(FedRadError):
    """A result came from randomness that was seeded for a test and must not be released."""

    __test__ = False


class NoiseInvalid(FedRadError):
    """A noise width or size is out of range."""


class PlanInvalid(FedRadError):
    """A privacy plan has an unknown field, a value out of range or an impossible combination."""


class AccountantsDisagree(FedRadError):
    """Two privacy accountants give values of epsilon that are too far apart, or one gave none."""


class BudgetExceeded(FedRadError):
    """A commitment or charge would pass a study's plan or the site's limits."""


class BudgetMismatch(FedRadError):
    """A charge or commitment is not what the study's committed privacy plan says."""


class BudgetCorrupt(FedRadError):
    """The privacy ledger was altered, or could not be written, and is not safe to use."""


class BudgetBusy(FedRadError):
    """Another process has the privacy ledger open."""


# --- engines (deploy/local) -------------------------------------------------------------------------------


class EngineFailed(FedRadError):
    """The engine that carries ServerApp and ClientApps could not start or could not go on."""


class EngineBusy(EngineFailed):
    """Another run uses this process or directory, or more wait for the engine than it takes."""


class UnknownNode(EngineFailed):
    """A message is addressed to a node that the grid does not have."""


class RelayInvalid(FedRadError):
    """Flower records do not hold one envelope in the parts that the relay makes."""


class ProcessDied(EngineFailed):
    """A process that the engine needs ended by itself; the message names it and ends with its log."""


class ProcessNotReady(EngineFailed):
    """A process did not come up within its time limit."""


class RunFailed(EngineFailed):
    """The ServerApp ended with an error or was stopped."""


# --- ledger, audit and releases (common/ledger, server/log, server/releases, client/releases) --------------


class LedgerInvalid(FedRadError):
    """A ledger, one of its entries, notes, proofs or files is not what it must be."""


class InclusionInvalid(LedgerInvalid):
    """An inclusion proof does not lead from the leaf to the root."""


class NoteInvalid(LedgerInvalid):
    """A signed note, verifier key, checkpoint or ledger proof is malformed or not canonical."""


class NoteSignatureInvalid(LedgerInvalid):
    """A signature of a known key on a note does not verify, or the required one is missing."""


class QuorumNotReached(LedgerInvalid):
    """A checkpoint carries fewer valid cosignatures of known witnesses than the study asks for."""


class LogForked(LedgerInvalid):
    """Two signed checkpoints of one log cannot belong to one append-only history."""


class LogShrunk(LedgerInvalid):
    """A log showed a smaller tree than it had shown before."""


class LogRewritten(LedgerInvalid):
    """Stored leaves do not hash to the root that the log has signed."""


class LogTruncated(LedgerInvalid):
    """A log file holds fewer leaves than the log has signed."""


class EntryInvalid(LedgerInvalid):
    """A ledger entry has an unknown, missing, mistyped or impossible field, or a bad signature."""


class BundleInvalid(LedgerInvalid):
    """An audit bundle is damaged, has an unknown member or is not in its one encoding."""


class LogInUse(LedgerInvalid):
    """Another process has the log open for writing."""


class WitnessBehind(LedgerInvalid):
    """A consistency proof starts at another size than the last one this witness has seen."""


# --- data import (client/data) ----------------------------------------------------------------------------


class SourceInvalid(FedRadError):
    """The folder or table to import cannot be read as the format says."""


class SiteKeyInvalid(FedRadError):
    """The site key file is missing, malformed or readable by others."""


class RecogniserInvalid(FedRadError):
    """A plugged-in recogniser of names cannot be loaded, failed, or answered outside the text."""


class ImportBusy(FedRadError):
    """Another import into the same folder is running."""


class StudyRejected(FedRadError):
    """One study cannot become a pair; `reason` says why, in one of `client.data.study.Reason`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


# --- model and reports ------------------------------------------------------------------------------------


class PromptTooLong(FedRadError):
    """A prompt leaves no room for a report."""


class FeatureMismatch(FedRadError):
    """Vision features do not fit the image placeholders of a prompt."""


class ImageUnreadable(FedRadError):
    """An image file is truncated, corrupt, too large or not an image."""


class ScoresInvalid(FedRadError):
    """Predictions and references cannot be scored against each other."""


# --- secure aggregation (common/secagg, client/secagg, server/secagg) ---------------------------------------


class SecureAggregationError(FedRadError):
    """Base of every refusal of the secure aggregation protocol."""


class MessageMalformed(SecureAggregationError):
    """A protocol message is truncated, too long, of another type, or has a field of the wrong size."""


class PublicKeyInvalid(SecureAggregationError):
    """A public key is not canonical, or is a point of low order (the all-zero point among them)."""


class KeysRepeated(SecureAggregationError):
    """Two keys that must differ are equal: within one site, or between two sites."""


class KeysForged(SecureAggregationError):
    """A site's ephemeral keys do not bear the signature of its pinned identity."""


class OwnKeysAltered(SecureAggregationError):
    """The key set attributes to a site other keys than it advertised."""


class SiteUnknown(SecureAggregationError):
    """A site is not among those that the manifest pins."""


class SiteRepeated(SecureAggregationError):
    """A site occurs twice in one list."""


class SiteMissing(SecureAggregationError):
    """A list does not hold a site that it must hold."""


class TermsDiffer(SecureAggregationError):
    """A message belongs to another study, configuration, round or attempt."""


class KeySetDiffers(SecureAggregationError):
    """A message was made for another set of ephemeral keys."""


class ContextDiffers(SecureAggregationError):
    """A message was made for another global adapter, roster, key set or round."""


class ShareUnreadable(SecureAggregationError):
    """A sealed share is not from that sender, not for this site, or not for this key set."""


class StageOutOfOrder(SecureAggregationError):
    """A step was asked for before the steps that it builds on."""


class SecondKeySet(SecureAggregationError):
    """A site was asked to deal shares again, for another key set."""


class SecondOpening(SecureAggregationError):
    """A site was asked to open its round again, on another adapter or roster."""


class SecondUpload(SecureAggregationError):
    """A site was asked to mask a second vector, or to reveal secrets for an upload it did not make."""


class SecondSurvivorSet(SecureAggregationError):
    """A site was asked to reveal secrets again, for another survivor set."""


class BothSecretsAsked(SecureAggregationError):
    """A request calls one peer both survivor and dropped, which would reveal both of its secrets."""


class UploadForged(SecureAggregationError):
    """An upload's receipt does not bear the signature of its site."""


class UploadCorrupted(SecureAggregationError):
    """The bytes of an upload are not those that its receipt commits to."""


class RevealForged(SecureAggregationError):
    """A reveal does not bear the signature of its site."""


class DealtWrong(SecureAggregationError):
    """A round's sum cannot be unmasked; `site` names whose dealing is why, empty where that is open."""

    def __init__(self, message: str, *, site: str = "") -> None:
        super().__init__(message)
        self.site = site


class ShareWrong(DealtWrong):
    """Too few of the revealed shares of a secret are those that its owner dealt."""


class SecretWrong(DealtWrong):
    """A rebuilt secret is not the one that its owner advertised."""


class VectorInvalid(SecureAggregationError):
    """A vector is not a writable one-dimensional uint32 array of the agreed length."""


class SumInterrupted(SecureAggregationError):
    """The server stopped in the middle of adding an upload, so that the sum cannot be trusted."""


class RoundAbandoned(SecureAggregationError):
    """The round has ended without a sum."""


class LeakGateFailed(FedRadError):
    """De-identification found too few of the identifiers planted in this site's own reports."""


class PatientUnknown(FedRadError):
    """A patient to withdraw is not in the prepared data."""


# --- published releases and the access log (server/releases, client/releases, client/access) ---------------


class ReleaseSourceUnreachable(FedRadError):
    """The release repository cannot be read: no such folder, stick or host."""


class ReleaseUnproven(FedRadError):
    """A release lacks a TUF signature, its ledger proof, or is not the files that were logged."""


class ReleaseStale(FedRadError):
    """The repository shows metadata that has expired or is older than what this site has seen."""


class RollbackNotPermitted(FedRadError):
    """An older version was asked for without a signed permission or a local pin with a reason."""


class VersionUnknown(FedRadError):
    """This site does not hold the release version that was named."""


class RepositoryInvalid(FedRadError):
    """A release repository misses a role, a key or a signature that publishing needs."""


class AccessLogInvalid(FedRadError):
    """The access log is damaged, or its chain does not hold."""


class PayloadShredded(FedRadError):
    """The key of this payload was destroyed; what it said cannot be read any more."""


class ReceiverRefused(FedRadError):
    """The DICOM receiver may not start: no allowed senders, no TLS, or a key that cannot be used."""


class InstructionRefused(FedRadError):
    """Instruction data is unusable, or its endpoint is not on this machine."""


# --- serving (client/serving) -----------------------------------------------------------------------------


class EngineWorkerDied(FedRadError):
    """The process that wrote this answer ended without finishing it, and again when it was tried alone."""


class EngineStopped(FedRadError):
    """The engine is stopping or could not be started; ask again later."""


class GroundingUnavailable(FedRadError):
    """This model or engine cannot say which image regions a sentence rests on."""


class DraftUnknown(FedRadError):
    """No draft of that id is remembered; only the latest are."""


class GuardNotCalibrated(FedRadError):
    """The guard has no calibration for this base from this site's own images."""


class CanaryFailed(FedRadError):
    """A new release did worse on the canary studies than the one in use; the switch was not made."""


class ParityFailed(FedRadError):
    """A GGUF file computes other probabilities than the release it was made from."""


class SwitchSuperseded(FedRadError):
    """While a release was tried on the canary studies, another decision was made; it is followed instead."""


class ServingRefused(FedRadError):
    """Serving may not start as asked: beyond loopback without TLS and users, without a guard, or on a card
    that this torch build has no code for."""


class RequestRefused(FedRadError):
    """A request is malformed, or asks for something that this service does not do."""


class NotAuthenticated(FedRadError):
    """No valid token or client certificate came with the request."""


class TooManyRequests(FedRadError):
    """This user asks faster than the limit allows."""


# --- enrolment and deployment (common/enrolment, server/authority, deploy/server, deploy/site) -------------


class EnrolmentInvalid(FedRadError):
    """An enrolment request, bundle or site request is malformed or lacks a proof of possession."""


class FingerprintMismatch(FedRadError):
    """The fingerprint that was read out on the telephone is not that of the file."""


class SiteNotEnrolled(FedRadError):
    """A site is not in the operator's registry, or this machine holds no enrolment."""


class SiteRevoked(FedRadError):
    """The operator has revoked this site."""


class CertificateInvalid(FedRadError):
    """A certificate or key of the consortium is missing, expired, of another kind or signed by another."""


class ClockSkewed(FedRadError):
    """The clocks of site and server differ by more than the consortium tolerates."""


class ServerUnreachable(FedRadError):
    """The server cannot be reached: name, route, proxy or certificate; the message says which."""


class ProxyUnsupported(ServerUnreachable):
    """The hospital's proxy is set in a form, or spoken to in a way, that this release does not know."""


class ConsortiumInvalid(FedRadError):
    """The operator's directory is missing, incomplete or has a wrong field."""


class StudyNotReady(FedRadError):
    """A study has not been approved by all its sites, or one of them is not enrolled."""


# --- bases (common/model/convert, client/base_cli) ---------------------------------------------------------


class ConversionRefused(FedRadError):
    """A foreign checkpoint holds what its kind does not, lacks what it needs, or could carry code."""


# --- worklist and page (client/serving/worklist, client/serving/page) --------------------------------------


class CaseUnknown(FedRadError):
    """The worklist holds no case of that id."""


class CaseDamaged(FedRadError):
    """A file of a case cannot be read; the message names it and what to do. Other cases are not concerned."""


class CaseDecided(FedRadError):
    """A reader has accepted or rejected this case's draft; a decision is not changed."""


class SignOffInvalid(FedRadError):
    """An accepted text or a reason is missing or too long."""


# --- PACS loop (client/pacs) -------------------------------------------------------------------------------


class PacsConfigInvalid(FedRadError):
    """The PACS configuration has an unknown, missing or impossible field."""


class JobUnknown(FedRadError):
    """The PACS queue holds no such job, or not in that state."""


class DestinationUnreachable(FedRadError):
    """The PACS or FHIR server that drafts go to does not answer, or does not accept them."""


class DeliveryFailed(FedRadError):
    """A report could not be delivered now; another attempt may succeed."""


class DeliveryRefused(FedRadError):
    """The other side refused a report for good; another attempt would be refused too."""


# --- evaluation (client/evaluate) ---------------------------------------------------------------------------


class EvaluationRefused(FedRadError):
    """An evaluation lacks data, its folder holds another one, or its settings do not fit together."""


class JudgeAnswerInvalid(FedRadError):
    """A judge's answer is not the JSON that was asked for."""


# --- versions, backup, pages for operators (common/compatibility, server/backup, common/metrics_page) -------


class ApprovalOutdated(FedRadError):
    """An approval is not from after the withdrawal of the same site that the server holds."""


class VersionsTooFarApart(FedRadError):
    """Server and site have no protocol version in common; the message names the side to upgrade."""


class BackupInvalid(FedRadError):
    """A backup file is damaged, truncated, of another format, or was sealed with another passphrase."""


class BackupRefused(FedRadError):
    """A backup or restore would replace something, or the directory would not stay still."""


class ListenAddressInvalid(FedRadError):
    """An address to listen on is not HOST:PORT, or is taken."""


# --- traces (common/traces) ---------------------------------------------------------------------------------


class CollectorInvalid(FedRadError):
    """Where traces should go is no OTLP/HTTP address, or one that this program does not send to."""
