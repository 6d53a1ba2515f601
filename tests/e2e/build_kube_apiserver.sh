#!/usr/bin/env bash
# Builds a real kube-apiserver (Kubernetes 1.20.2, Debian's source package) into the user's cache, once.
# Needs Debian 12 and its packages, root to install them, and some ten minutes of one core; afterwards nothing is done.
# Nothing is downloaded but Debian packages: the vendored sources are complete, so that no Go module proxy is asked.
set -euo pipefail

cache="${XDG_CACHE_HOME:-$HOME/.cache}/flyball/kubernetes-1.20.2"
if [ -x "$cache/kube-apiserver" ]; then
  echo "kube-apiserver is at $cache/kube-apiserver"
  exit 0
fi
packages=(golang-go etcd-server rsync golang-github-modern-go-reflect2-dev dpkg-dev openssl)
missing=()
for package in "${packages[@]}"; do dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package"); done
if [ "${#missing[@]}" -gt 0 ]; then
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "the build needs the Debian packages ${missing[*]}; install them" >&2
    exit 1
  fi
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "${missing[@]}"
fi

mkdir -p "$cache"
work=$(mktemp -d "$cache/build.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/parts"

# The same archive as a source archive, in lists of our own: the machine's stay as they are.
for file in /etc/apt/sources.list /etc/apt/sources.list.d/*; do
  [ -f "$file" ] || continue
  grep -qi '/debian' "$file" || continue
  case "$file" in
    *.sources) sed 's/^Types:.*/Types: deb-src/' "$file" >"$work/parts/$(basename "$file")" ;;
    *) sed -n 's/^deb \(.*\/debian.*\)/deb-src \1/p' "$file" >"$work/parts/$(basename "$file" .list).list" ;;
  esac
done
apt=(apt-get -qq -o "Dir::Etc::sourcelist=/dev/null" -o "Dir::Etc::sourceparts=$work/parts"
  -o "Dir::State::lists=$work/lists" -o "APT::Get::List-Cleanup=0" -o "APT::Sandbox::User=root")
"${apt[@]}" update
cd "$work"
"${apt[@]}" source --download-only kubernetes
dpkg-source -x --no-check ./*.dsc "$work/tree"

# The vendored reflect2 1.0.1 crashes under Go 1.18 and newer on the first custom object; Debian has 1.0.2.
reflect2="$work/tree/vendor/github.com/modern-go/reflect2"
rm -rf "$reflect2"
cp -r /usr/share/gocode/src/github.com/modern-go/reflect2 "$reflect2"
find "$reflect2" -name '*_test.go' -delete

mkdir -p "$work/gopath/src/k8s.io"
ln -s "$work/tree" "$work/gopath/src/k8s.io/kubernetes"
cat >"$work/version" <<'VERSION'
KUBE_GIT_COMMIT='unknown'
KUBE_GIT_TREE_STATE='archive'
KUBE_GIT_VERSION='v1.20.2'
KUBE_GIT_MAJOR='1'
KUBE_GIT_MINOR='20'
VERSION
cd "$work/gopath/src/k8s.io/kubernetes"
export GOPATH="$work/gopath" GO111MODULE=off GOPROXY=off CGO_ENABLED=0 GOCACHE="$work/gocache" KUBE_GIT_VERSION_FILE="$work/version"
make WHAT=cmd/kube-apiserver
cp "$work/tree/_output/bin/kube-apiserver" "$cache/kube-apiserver.new" # a link to the platform's own folder
mv "$cache/kube-apiserver.new" "$cache/kube-apiserver"
echo "kube-apiserver is at $cache/kube-apiserver"
