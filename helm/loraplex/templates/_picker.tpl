{{/*
The endpoint picker, and what Envoy needs to ask it. Where it is away or knows nothing, Envoy goes by its own policy: the
consistent hashing of _envoy.tpl.
*/}}
{{- define "loraplex.pickerSelector" -}}
app.kubernetes.io/name: {{ include "loraplex.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: picker
{{- end -}}

{{/* Not empty where Envoy takes HTTP for the servers, too: only the picker reads an adapter from a body. */}}
{{- define "loraplex.httpBehindEnvoy" -}}
{{- if and .Values.envoy.enabled .Values.picker.enabled .Values.http.enabled }}true{{ end -}}
{{- end -}}

{{/* The picker's own configuration file. */}}
{{- define "loraplex.pickerConfig" -}}
{{- $picker := .Values.picker -}}
{{- $replicas := list -}}
{{- range .Values.envoy.endpoints -}}
{{- $one := dict "host" .host "data_port" .port "health_port" .healthPort "metrics_port" .metricsPort -}}
{{- if .httpPort -}}{{- $_ := set $one "http_port" .httpPort -}}{{- end -}}
{{- $replicas = append $replicas $one -}}
{{- else -}}
{{- $ports := .Values.ports -}}
{{- $host := printf "%s-replicas.%s.svc" (include "loraplex.fullname" .) .Release.Namespace -}}
{{- $one := dict "host" $host "data_port" $ports.data "health_port" $ports.health "metrics_port" $ports.metrics -}}
{{- if .Values.http.enabled -}}{{- $_ := set $one "http_port" .Values.http.port -}}{{- end -}}
{{- $replicas = append $replicas $one -}}
{{- end -}}
{{- dict
  "listen" (printf "%s:%v" $picker.bindAddress $picker.port)
  "metrics_listen" (printf "%s:%v" $picker.bindAddress $picker.metricsPort)
  "insecure" true
  "log_level" .Values.logLevel
  "queue" $picker.queue
  "balance_factor" (divf $picker.balanceFactor 100)
  "replicas" $replicas
  | toYaml -}}
{{- end -}}

{{/* Envoy asks before it routes; what the picker does not say in time is not waited for. */}}
{{- define "loraplex.pickerFilter" -}}
- name: envoy.filters.http.ext_proc
  typed_config:
    "@type": type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor
    grpc_service:
      envoy_grpc: { cluster_name: picker }
    failure_mode_allow: true
    message_timeout: {{ .Values.picker.timeoutSeconds }}s
    processing_mode: { request_header_mode: SEND, response_header_mode: SKIP }
    metadata_options:
      receiving_namespaces: { untyped: [envoy.lb] }
{{- end -}}

{{/* HTTP names its adapter in the body, of which the picker sees the beginning. */}}
{{- define "loraplex.pickerHttpRoute" -}}
- match: { prefix: / }
  route:
    cluster: replicas-http
    timeout: 0s
    hash_policy:
      - header: { header_name: loraplex-routing-key }
        terminal: true
    retry_policy:
      retry_on: connect-failure,refused-stream,reset-before-request,retriable-status-codes
      retriable_status_codes: [503] # nothing has begun
      num_retries: 3
      retry_back_off: { base_interval: 0.025s, max_interval: 0.25s }
  typed_per_filter_config:
    envoy.filters.http.ext_proc:
      "@type": type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExtProcPerRoute
      overrides:
        processing_mode:
          request_header_mode: SEND
          response_header_mode: SKIP
          request_body_mode: BUFFERED_PARTIAL
{{- end -}}

{{/* The endpoints are taken from what the picker said, never from a header, which a caller could have sent. */}}
{{- define "loraplex.pickerPolicy" -}}
load_balancing_policy:
  policies:
    - typed_extension_config:
        name: envoy.load_balancing_policies.override_host
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.load_balancing_policies.override_host.v3.OverrideHost
          override_host_sources:
            - metadata: { key: envoy.lb, path: [{ key: x-gateway-destination-endpoint }] }
          fallback_policy:
            policies:
              - typed_extension_config:
                  name: envoy.load_balancing_policies.ring_hash
                  typed_config:
                    "@type": type.googleapis.com/envoy.extensions.load_balancing_policies.ring_hash.v3.RingHash
                    minimum_ring_size: {{ .Values.envoy.minimumRingSize }}
                    consistent_hashing_lb_config: { hash_balance_factor: {{ .Values.envoy.balanceFactor }} }
{{- end -}}

{{- define "loraplex.pickerCluster" -}}
{{- $picker := .Values.picker -}}
- name: picker
  type: STRICT_DNS
  dns_refresh_rate: 2s
  respect_dns_ttl: false
  connect_timeout: 1s
  lb_policy: ROUND_ROBIN
  typed_extension_protocol_options:
    envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
      "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
      explicit_http_config:
        http2_protocol_options:
          connection_keepalive: { interval: 10s, timeout: 5s }
  circuit_breakers:
    thresholds:
      - max_requests: 16384
        max_pending_requests: 16384
  load_assignment:
    cluster_name: picker
    endpoints:
      - lb_endpoints:
          - endpoint:
              address:
                {{- if $picker.host }}
                socket_address: { address: {{ $picker.host | quote }}, port_value: {{ $picker.port }} }
                {{- else }}
                socket_address: { address: {{ printf "%s-picker.%s.svc" (include "loraplex.fullname" .) .Release.Namespace }}, port_value: {{ $picker.port }} }
                {{- end }}
{{- end -}}
