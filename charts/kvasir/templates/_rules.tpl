{{- /* What the operator does at the API server. A test holds these against its calls: no verb more, none less. */ -}}
{{- define "kvasir.rules" -}}
- apiGroups: [serving.kvasir.dev]
  resources: [inferenceservices]
  verbs: [get, list, watch]
- apiGroups: [serving.kvasir.dev]
  resources: [inferenceservices/status]
  verbs: [patch]
- apiGroups: [serving.kvasir.dev]
  resources: [inferenceroles]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [serving.kvasir.dev]
  resources: [inferenceroles/status]
  verbs: [patch]
- apiGroups: [apps]
  resources: [deployments]
  verbs: [get, list, watch, create, patch, delete]
# Where it is installed: workers over several nodes.
- apiGroups: [leaderworkerset.x-k8s.io]
  resources: [leaderworkersets]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [services]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [serviceaccounts]
  verbs: [get, list, create, patch, delete]
# The routers' Roles grant list and watch of pods, and nobody may grant what they have not got.
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch]
# They follow pods to their owners, and so does the operator.
- apiGroups: [apps]
  resources: [replicasets, statefulsets]
  verbs: [get]
- apiGroups: [rbac.authorization.k8s.io]
  resources: [roles, rolebindings]
  verbs: [get, list, create, patch, delete]
- apiGroups: [networking.k8s.io]
  resources: [ingresses, networkpolicies]
  verbs: [get, list, create, patch, delete]
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [get, list, create, patch, delete]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [monitoring.coreos.com]
  resources: [podmonitors]
  verbs: [get, list, create, patch, delete]
- apiGroups: [gateway.networking.k8s.io]
  resources: [httproutes]
  verbs: [get, list, create, patch, delete]
- apiGroups: [inference.networking.k8s.io]
  resources: [inferencepools]
  verbs: [get, list, create, patch, delete]
# Whether another operator that has a service is still there.
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  verbs: [get]
- apiGroups: [""]
  resources: [events]
  verbs: [create]
{{- end }}

{{- /* Certificates of services' pods. Neither verb shows a Secret: an update answers with what was sent. */ -}}
{{- define "kvasir.secretRules" -}}
- apiGroups: [""]
  resources: [secrets]
  verbs: [create, update]
{{- end }}

{{- /* The same where cert-manager issues them: no Secret is written. */ -}}
{{- define "kvasir.issuerRules" -}}
- apiGroups: [cert-manager.io]
  resources: [certificates]
  verbs: [get, list, create, patch, delete]
{{- end }}

{{- define "kvasir.certificateRules" -}}
{{ include (ternary "kvasir.issuerRules" "kvasir.secretRules" (not (empty .Values.certificates.issuerRef))) . }}
{{- end }}

{{- /* In the operator's own namespace: the Lease. */ -}}
{{- define "kvasir.leaseRules" -}}
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  verbs: [create]
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  resourceNames: [{{ include "kvasir.fullname" . }}]
  verbs: [get, update]
{{- end }}

{{- /* And the authority that signs pods' certificates, where cert-manager does not. */ -}}
{{- define "kvasir.authorityRules" -}}
- apiGroups: [""]
  resources: [secrets]
  verbs: [create]
- apiGroups: [""]
  resources: [secrets]
  resourceNames: [{{ include "kvasir.fullname" . }}-authority]
  verbs: [get, update]
{{- end }}
