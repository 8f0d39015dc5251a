{{- define "loraplex.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "loraplex.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else if contains (include "loraplex.name" .) .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "loraplex.name" .) | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "loraplex.selector" -}}
app.kubernetes.io/name: {{ include "loraplex.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: server
{{- end -}}

{{- define "loraplex.envoySelector" -}}
app.kubernetes.io/name: {{ include "loraplex.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: envoy
{{- end -}}

{{- define "loraplex.labels" -}}
app.kubernetes.io/name: {{ include "loraplex.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "loraplex.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "loraplex.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* By its digest, where one is given: then the tag is for people. */}}
{{- define "loraplex.image" -}}
{{- $tagged := printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- with .Values.image.digest -}}{{- printf "%s@%s" $tagged . -}}{{- else -}}{{- $tagged -}}{{- end -}}
{{- end -}}

{{/* The claim of a volume: dict "root" $ "name" "models" */}}
{{- define "loraplex.claim" -}}
{{- $volume := index .root.Values.persistence .name -}}
{{- default (printf "%s-%s" (include "loraplex.fullname" .root) .name) $volume.existingClaim -}}
{{- end -}}

{{/* The service's configuration file. What the chart decides itself may not be set by `config`. */}}
{{- define "loraplex.config" -}}
{{- $ports := .Values.ports -}}
{{- $own := dict
  "listen" (printf "0.0.0.0:%v" $ports.data)
  "admin_listen" (printf "0.0.0.0:%v" $ports.admin)
  "health_listen" (printf "0.0.0.0:%v" $ports.health)
  "metrics_listen" (printf "0.0.0.0:%v" $ports.metrics)
  "drain_grace_seconds" .Values.drain.graceSeconds
  "lame_duck_seconds" .Values.drain.lameDuckSeconds
  "log_level" .Values.logLevel
  "models" .Values.models
-}}
{{- if .Values.dialects -}}{{- $_ := set $own "dialects" .Values.dialects -}}{{- end -}}
{{- if .Values.http.enabled -}}
{{- $_ := set $own "http_listen" (printf "0.0.0.0:%v" .Values.http.port) -}}
{{- $service := include "loraplex.fullname" . -}}
{{- $inNamespace := printf "%s.%s" $service .Release.Namespace -}}
{{- $hosts := list $service $inNamespace (printf "%s.svc" $inNamespace) (printf "%s.svc.cluster.local" $inNamespace) -}}
{{- if include "loraplex.httpBehindEnvoy" . -}}
{{- $hosts = concat $hosts (list (printf "%s-envoy" $service) (printf "%s-envoy.%s" $service .Release.Namespace) (printf "%s-envoy.%s.svc" $service .Release.Namespace)) -}}
{{- end -}}
{{- $_ := set $own "http_hosts" (concat $hosts .Values.http.hosts) -}}
{{- if .Values.http.admin -}}{{- $_ := set $own "http_admin" true -}}{{- end -}}
{{- end -}}
{{- if .Values.adapters -}}{{- $_ := set $own "adapters" .Values.adapters -}}{{- end -}}
{{- if .Values.persistence.adapters.enabled -}}
{{- $_ := set $own "adapter_roots" (list .Values.persistence.adapters.mountPath) -}}
{{- end -}}
{{- /* Of a fleet's replica it is what it knew last, and the files that were uploaded there: as long as its pod. */ -}}
{{- $ownState := ternary "/var/cache/loraplex/state" "" (ne .Values.state.secretName "") -}}
{{- $_ := set $own "state_directory" (ternary .Values.persistence.state.mountPath $ownState .Values.persistence.state.enabled) -}}
{{- if .Values.tls.enabled -}}
{{- $tls := dict "certificate" "/etc/loraplex/tls/tls.crt" "key" "/etc/loraplex/tls/tls.key" -}}
{{- if .Values.tls.requireClientCertificate -}}{{- $_ := set $tls "client_ca" "/etc/loraplex/tls/ca.crt" -}}{{- end -}}
{{- $_ := set $own "tls" $tls -}}
{{- end -}}
{{- $auth := dict -}}
{{- if .Values.auth.keysSecret -}}{{- $_ := set $auth "keys" "/etc/loraplex/keys/keys.yaml" -}}{{- end -}}
{{- if .Values.auth.jwt -}}{{- $_ := set $auth "jwt" .Values.auth.jwt -}}{{- end -}}
{{- if $auth -}}{{- $_ := set $own "auth" $auth -}}{{- end -}}
{{- /* The metrics are plaintext, behind the network policy; for the calls `loraplex.check` sees to it. */ -}}
{{- $_ := set $own "insecure" true -}}
{{- range $key, $_ := .Values.config -}}
{{- if hasKey $own $key -}}{{- fail (printf "config.%s: the chart sets this key from its own values; see the chart's README" $key) -}}{{- end -}}
{{- end -}}
{{- /* Envoy shares a few connections among all callers, and by default nobody else reaches the port. */ -}}
{{- $behindEnvoy := dict "limits" (dict "calls_per_connection" 256) -}}
{{- merge (deepCopy .Values.config) $own (ternary $behindEnvoy dict .Values.envoy.enabled) | toYaml -}}
{{- end -}}

{{/* Contradictions that a schema cannot express. */}}
{{- define "loraplex.check" -}}
{{- if not .Values.models -}}{{- fail "models: there is none; name at least one, such as {name: llama-8b, model: meta-llama/Llama-3.1-8B-Instruct}" -}}{{- end -}}
{{- if and .Values.tls.enabled (not .Values.tls.secretName) -}}{{- fail "tls.secretName: name the secret that holds tls.crt and tls.key, or set tls.enabled: false" -}}{{- end -}}
{{- $closed := and .Values.tls.enabled (or .Values.auth.keysSecret .Values.auth.jwt .Values.tls.requireClientCertificate) -}}
{{- if not (or $closed .Values.insecure) -}}
{{- fail "insecure: calls would be neither encrypted nor authenticated; set tls.enabled with auth.keysSecret, auth.jwt or tls.requireClientCertificate, or insecure: true where the network is trusted" -}}
{{- end -}}
{{- if and .Values.auth.jwtSecret (not .Values.auth.jwt) -}}{{- fail "auth.jwtSecret: it holds files that auth.jwt names, such as jwks_ca: /etc/loraplex/jwt/ca.crt; set auth.jwt" -}}{{- end -}}
{{- if and .Values.adapters (not .Values.persistence.adapters.enabled) (not (hasKey .Values.config "adapter_roots")) -}}
{{- fail "adapters: they are read from a volume; set persistence.adapters.enabled: true, or config.adapter_roots" -}}
{{- end -}}
{{- if and .Values.persistence.state.enabled (or (gt (int .Values.replicas) 1) (ne .Values.autoscaling.kind "none")) -}}
{{- fail "persistence.state: each replica keeps a state of its own, so it is for replicas: 1 without autoscaling; give several a database (state.secretName), or declare adapters in `adapters`" -}}
{{- end -}}
{{- range $key := list "state" "fleet_listen" "fleet_address" -}}
{{- if hasKey $.Values.config $key -}}{{- fail (printf "config.%s: use state.secretName; the configuration is a ConfigMap, in which an address with a password is no secret" $key) -}}{{- end -}}
{{- end -}}
{{- $over := list -}}
{{- range .Values.models -}}{{- if gt (int (default 1 .machines)) 1 -}}{{- $over = append $over .name -}}{{- end -}}{{- end -}}
{{- if gt (len $over) 1 -}}{{- fail (printf "models: %s have machines above 1, as one may; install a release for each" (join ", " $over)) -}}{{- end -}}
{{- if and $over (not .Values.machines.secretName) -}}{{- fail "machines.secretName: name the secret that the machines of the model know each other by" -}}{{- end -}}
{{- if and $over (ne .Values.autoscaling.kind "none") -}}{{- fail "autoscaling: it is for servers of one pod each, and a model has machines above 1; set replicas" -}}{{- end -}}
{{- range $key := list "machines_listen" "machines_secret" -}}
{{- if hasKey $.Values.config $key -}}{{- fail (printf "config.%s: the chart sets this key for each pod; set machines.secretName" $key) -}}{{- end -}}
{{- end -}}
{{- range $key, $_ := (default dict .Values.config.object_store) -}}
{{- if regexMatch "(?i)secret|token|password" $key -}}{{- fail (printf "config.object_store.%s: the configuration is a ConfigMap, which holds no secrets; set AWS_SECRET_ACCESS_KEY and its like in extraEnv, from a secret" $key) -}}{{- end -}}
{{- end -}}
{{- if (default dict .Values.config.otlp).headers -}}{{- fail "config.otlp.headers: the configuration is a ConfigMap, which holds no secrets; set OTEL_EXPORTER_OTLP_HEADERS in extraEnv, from a secret" -}}{{- end -}}
{{- $taken := dict -}}
{{- range $name, $port := merge (ternary (dict "http" .Values.http.port) dict .Values.http.enabled) .Values.ports -}}
{{- $number := printf "%v" $port -}}
{{- with index $taken $number -}}{{- fail (printf "ports: %s and %s are both %s; give each its own" . $name $number) -}}{{- end -}}
{{- $_ := set $taken $number $name -}}
{{- end -}}
{{- if and (eq .Values.autoscaling.kind "keda") (not .Values.autoscaling.prometheusUrl) -}}{{- fail "autoscaling.prometheusUrl: keda reads the metrics from Prometheus; say where it is" -}}{{- end -}}
{{- if gt (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas) -}}{{- fail "autoscaling.minReplicas must not exceed autoscaling.maxReplicas" -}}{{- end -}}
{{- range .Values.envoy.endpoints -}}
{{- if and $.Values.picker.enabled (not .metricsPort) -}}{{- fail "envoy.endpoints: the picker reads the metrics of each; say its metricsPort" -}}{{- end -}}
{{- if and (include "loraplex.httpBehindEnvoy" $) (not .httpPort) -}}{{- fail "envoy.endpoints: HTTP goes through Envoy; say the httpPort of each" -}}{{- end -}}
{{- end -}}
{{- if and .Values.envoy.enabled .Values.tls.requireClientCertificate (not .Values.envoy.tlsSecretName) -}}{{- fail "envoy.tlsSecretName: the servers ask callers for a certificate, and Envoy is their caller; name its secret" -}}{{- end -}}
{{- end -}}
