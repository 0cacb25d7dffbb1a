"""What each reason and flag means, in one sentence each, for the contact sheet and the summary.

Guarantees: every `Reason` and every flag that the import sets has its sentence (tested).
"""

from __future__ import annotations

from collections.abc import Mapping

from client.data.study import Reason

REASONS: Mapping[Reason, str] = {
    Reason.NO_IDENTIFIER: "the row or file names no patient or no study",
    Reason.DUPLICATE_STUDY: "the same study came before",
    Reason.PATIENT_CONFLICT: "one study, two patients",
    Reason.NO_REPORT: "images without a report",
    Reason.NO_FINDINGS: "the report has no findings left after cleaning",
    Reason.REPORT_UNREADABLE: "the report is damaged or not text",
    Reason.REPORT_TOO_LONG: "the report is longer than any report",
    Reason.NO_IMAGE: "a report without images",
    Reason.LATERAL_VIEW: "only lateral or other views",
    Reason.NOT_CHEST: "the header says: no chest radiograph",
    Reason.NOT_ORIGINAL: "not made for reading (localizer, for processing, two colours)",
    Reason.IMAGE_MISSING: "the table names an image that is not there",
    Reason.IMAGE_OUTSIDE: "the image lies outside the folder or behind a link",
    Reason.IMAGE_UNREADABLE: "the image file is damaged or of another kind",
    Reason.IMAGE_TOO_LARGE: "larger than any radiograph, perhaps a bomb",
    Reason.IMAGE_TOO_SMALL: "a side of less than 64 pixels",
    Reason.IMAGE_BLANK: "almost no contrast",
    Reason.IMAGE_CRASHED: "the decoder ended with a crash",
    Reason.MULTI_FRAME: "several frames in one file",
    Reason.COLOUR: "a colour image",
    Reason.UNKNOWN_COMPRESSION: "no decoder here for this compression",
    Reason.DUPLICATE_IMAGE: "the same image came with another study of the patient",
    Reason.IMAGE_CONFLICT: "the same image under two patients: kept for neither",
    Reason.BURNED_IN_TEXT: "quarantine: writing in the image",
    Reason.UNLIKE_CHEST: "quarantine: the image does not look like an upright chest",
    Reason.RECOGNISER_FAILED: "quarantine: the recogniser of names failed on the report",
    Reason.WITHDRAWN: "the patient withdrew consent",
    Reason.IDENTIFIER_LEFT: "quarantine: a known identifier was still in the text",
}
FLAGS: Mapping[str, str] = {
    "boilerplate": "over five patients have this text word for word",
    "labels-disagree": "a label that came with the study says the opposite of the text",
    "machine-text": "reads as if a language model had written it",
    "much-redacted": "more than one word in eight was removed",
    "near-duplicate-image": "an image almost like that of another study; both are in one split",
    "near-duplicate-report": "a long report almost like another; both are in one split",
    "other-body-part": "the report speaks of a knee, a pelvis or the like: two examinations in one",
    "refers-to-prior": "still speaks of an earlier image after the removal of such words",
    "repeated-sentence": "the same sentence twice",
    "sections-disagree": "findings and impression say opposite things",
    "template-normal": "every sentence is a normal or negative phrase",
    "unlike-a-chest": "the image may be turned, inverted or of another part",
    "unlike-the-others": "the image does not resemble the site's mean",
    "very-short": "fewer than five words",
}
