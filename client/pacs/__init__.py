"""The PACS loop: an image comes by C-STORE, a preliminary report goes back as DICOM SR and FHIR.

config.py               pacs.toml → PacsConfig
jobs.py                 the durable queue: one folder per image, kill -9 at any point
structured_report.py    a draft as DICOM Enhanced SR, partial, unverified, preliminary
diagnostic_report.py    a draft as FHIR R4 DiagnosticReport, preliminary
sending.py              C-STORE and FHIR create; what may be tried again and what may not
loop.py                 receiver → drafts → deliveries
serve.py                start_pacs, for `fedrad-site serve --pacs`
"""
