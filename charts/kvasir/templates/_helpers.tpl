{{- define "kvasir.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 52 | trimSuffix "-" -}}
{{- end }}

{{- define "kvasir.fullname" -}}
{{- $name := include "kvasir.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end }}

{{- /* Of what no namespace keeps apart: two releases of one name in two namespaces must not meet. */ -}}
{{- define "kvasir.clusterName" -}}
{{- printf "%s-%s" .Release.Namespace (include "kvasir.fullname" .) -}}
{{- end }}

{{- define "kvasir.priorityClass" -}}
{{- default (printf "%s-serving" (include "kvasir.clusterName" .)) .Values.priorityClass.name -}}
{{- end }}

{{- /* A digest says more than a tag, and is what is pulled where both are given. */ -}}
{{- define "kvasir.image" -}}
{{- $tag := default .Chart.AppVersion .Values.image.tag -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository $tag -}}
{{- end -}}
{{- end }}

{{- define "kvasir.webhookName" -}}
{{- printf "%s-webhook" (include "kvasir.fullname" .) -}}
{{- end }}

{{- define "kvasir.webhookSecret" -}}
{{- default (include "kvasir.webhookName" .) .Values.webhook.certificate.secretName -}}
{{- end }}

{{- define "kvasir.selector" -}}
app.kubernetes.io/name: kvasir-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "kvasir.labels" -}}
{{ include "kvasir.selector" . }}
app.kubernetes.io/component: operator
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "kvasir.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "kvasir.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end }}

{{- /* Whose a definition is that is there already, as namespace/release, or "nobody's"; empty: it is this release's to make. */ -}}
{{- define "kvasir.crdOwner" -}}
{{- $root := index . 0 -}}
{{- $live := lookup "apiextensions.k8s.io/v1" "CustomResourceDefinition" "" (index . 1) -}}
{{- if $live -}}
{{- $notes := $live.metadata.annotations | default dict -}}
{{- $name := index $notes "meta.helm.sh/release-name" | default "" -}}
{{- $namespace := index $notes "meta.helm.sh/release-namespace" | default "" -}}
{{- if not $name -}}
nobody's
{{- else if or (ne $name $root.Release.Name) (ne $namespace $root.Release.Namespace) -}}
{{ $namespace }}/{{ $name }}
{{- end -}}
{{- end -}}
{{- end }}
