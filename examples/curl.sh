#!/bin/sh
# Segment with nothing but curl: a photo and a point in pixels in, a finished mask (COCO RLE) out.
# The photo is kept on the server, so the second click sends its id instead of the photo.
#
#   sh examples/curl.sh photo.jpg 320 240
#
# Through a proxy, set TRITON_SAM3_HTTP_URL=https://HOST:8443 TRITON_SAM3_TOKEN=…
set -eu
[ $# -ge 3 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 1; }
# Without it curl labels the body a form, and Triton 2.51 crashes on a large one.
json='Content-Type: application/json'
models=${TRITON_SAM3_HTTP_URL:-http://127.0.0.1:8000}/v2/models
photo=$1 x=$2 y=$3
# A proxy hashes this, so that both requests reach the server that keeps the photo.
image="x-sam3-image: $(sha256sum < "$photo" | cut -c1-64)"
token=${TRITON_SAM3_TOKEN:+"authorization: Bearer $TRITON_SAM3_TOKEN"}

ask() {
  curl --noproxy 127.0.0.1 --silent --show-error --fail-with-body "$models/$1/infer" --data @- \
    --header "$json" --header "$image" ${token:+--header "$token"}
}

# Print an output's "data" from the answer on stdin.
output() { sed "s/.*\"name\":\"$1\"[^]]*\][^[]*\[\([^]]*\)\].*/\1/"; }

first=$(ask sam3_interactive_file <<JSON
{"inputs": [
  {"name": "encoded_image", "datatype": "BYTES", "shape": [1, 1], "data": ["$(base64 < "$photo" | tr -d '\n')"]},
  {"name": "points", "datatype": "FP32", "shape": [1, 1, 1, 2], "data": [$x, $y]},
  {"name": "point_labels", "datatype": "INT32", "shape": [1, 1, 1], "data": [1]},
  {"name": "keep_image", "datatype": "BOOL", "shape": [1, 1], "data": [true]}]}
JSON
) || { printf "%s\n" "$first" >&2; exit 1; }  # the server's error
id=$(printf %s "$first" | output image_id) size=$(printf %s "$first" | output image_size)
echo "the object at $x, $y of $size pixels: box $(printf %s "$first" | output boxes)"

# The same point, and a background point in the top left corner; points are fractions here.
ask sam3_click_rle <<JSON
{"inputs": [
  {"name": "image_id", "datatype": "BYTES", "shape": [1, 1], "data": [$id]},
  {"name": "image_size", "datatype": "INT32", "shape": [1, 2], "data": [$size]},
  {"name": "point_coords", "datatype": "FP32", "shape": [1, 1, 2, 2],
   "data": [$(printf %s "$size" | awk -F, -v x="$x" -v y="$y" '{print x/$1 "," y/$2}'), 0.01, 0.01]},
  {"name": "point_labels", "datatype": "INT32", "shape": [1, 1, 2], "data": [1, 0]}]}
JSON
