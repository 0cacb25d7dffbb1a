{{- define "fedrad.name" -}}
{{- printf "%s" .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "fedrad.labels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "fedrad.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "fedrad.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag }}
{{- end -}}
{{- end -}}

{{- define "fedrad.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end -}}


{{/* The port of what the pod may reach: the proxy's where there is one, else the server's. */}}
{{- define "fedrad.way-out" -}}
{{- if .Values.proxy.existingSecret -}}
{{- if not .Values.proxy.port -}}
{{- fail "proxy.port: expected the proxy's port, because its URL is in a secret, got none" -}}
{{- end -}}
{{ .Values.proxy.port }}
{{- else if .Values.proxy.url -}}
{{ regexReplaceAll ".*:([0-9]+)$" .Values.proxy.url "${1}" }}
{{- else -}}
{{ .Values.server.port }}
{{- end -}}
{{- end -}}
