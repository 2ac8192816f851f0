#!/usr/bin/env bash
# Draws a trace (what ShutdownReport::to_trace() returns) as chrome://tracing does, into a PNG file:
#
#   bash tests/examples/trace_picture.sh shutdown.json examples/trace.png [WIDTH HEIGHT]
#
# The viewer is Chrome's own (Catapult), as Go's sources bring it along, in a headless Chromium. As root
# on Debian it installs both.
set -euo pipefail

[ $# -ge 2 ] || { sed -n '2,4s/^# \{0,1\}//p' "$0" >&2; exit 2; }
trace=$1 picture=$(realpath -m "$2") width=${3:-1000} height=${4:-560}

viewer() { find /usr/share/go-*/ -name trace_viewer_full.html 2>/dev/null | head -n 1; }
if ! command -v chromium >/dev/null || [ -z "$(viewer)" ]; then
  [ "$(id -u)" = 0 ] || { echo "Missing: Debian's chromium and golang-src" >&2; exit 1; }
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core golang-src >/dev/null
fi

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cp "$(dirname "$(viewer)")"/{trace_viewer_full.html,webcomponents.min.js} "$folder"
{ printf 'const trace = '; cat "$trace"; } >"$folder/trace.js"
cat >"$folder/index.html" <<'PAGE'
<!doctype html>
<meta charset="utf-8">
<script src="webcomponents.min.js"></script>
<script src="trace.js"></script>
<link rel="import" href="trace_viewer_full.html">
<style>
  html, body { margin: 0; height: 100%; overflow: hidden }
  tr-ui-timeline-view { width: 100%; height: 100% }
  /* Nobody can press anything in a picture. */
  tr-ui-b-info-bar-group, tr-ui-b-mouse-mode-selector, tr-ui-side-panel-container, tr-ui-b-drag-handle,
  tr-ui-a-analysis-view, tr-ui-timeline-view #control { display: none !important }
</style>
<body></body>
<script>
  addEventListener('WebComponentsReady', () => {
    const container = document.createElement('track-view-container');
    container.id = 'track_view_container';
    const view = document.createElement('tr-ui-timeline-view');
    view.track_view_container = container;
    Polymer.dom(view).appendChild(container);
    Polymer.dom(document.body).appendChild(view);
    const model = new tr.Model();
    const options = new tr.importer.ImportOptions();
    options.shiftWorldToZero = false;
    new tr.importer.Import(model, options).importTraces([JSON.stringify(trace)]);
    view.model = model;
  });
</script>
PAGE
chromium --headless=new --no-sandbox --disable-gpu --allow-file-access-from-files --hide-scrollbars \
  --user-data-dir="$folder/profile" --window-size="$width,$height" --virtual-time-budget=60000 \
  --screenshot="$picture" "file://$folder/index.html" 2>"$folder/log" ||
  { cat "$folder/log" >&2; exit 1; }
[ -s "$picture" ] || { cat "$folder/log" >&2; exit 1; }
