#!/usr/bin/env bash
# Installs the tools and servers of the tests, each at one pinned version, and nothing that is already there.
#
#   tools.sh apt            packages that Debian must provide (installs what is missing when root)
#   tools.sh servers        containerd, registry, dockerd, docker CLI into build/bin; classic engine into build/classic
#   tools.sh lint           staticcheck
#   tools.sh vuln           govulncheck, when its database can be reached (exit 3 when not)
#
# A tool's stamp, build/stamps/NAME, holds what it was built from. A tool is built again when it is missing or when its
# stamp says something else; a binary that is there without a stamp is adopted if Go's build information proves its version.
set -euo pipefail
cd "$(dirname "$0")/../.."

CONTAINERD=v2.4.2
REGISTRY=v3.1.2
MOBY=v2.0.0-beta.24
MOBY_VERSION=29.0.0 # what this engine calls itself: the CLI negotiates by it
DOCKER_CLI=v29.9.3+incompatible
STATICCHECK=v0.8.2
GOVULNCHECK=v1.9.0
CLASSIC=20.10 # Debian 12's docker.io: the last engine family with graph drivers only

# Two compilers at a time: a small machine runs other things beside this.
export GOFLAGS="-p=2" GOTOOLCHAIN=local CGO_ENABLED=0
bin=$PWD/build/bin
stamps=$PWD/build/stamps
mkdir -p "$bin" "$stamps"

# What the tests take from Debian, and why:
#   runc                 containers for both containerds and both engines
#   busybox-static       the small test image
#   mmdebstrap           the demo image, from Debian packages
#   fuse3                fusermount for FUSE trees
#   iptables iproute2    engine bridges; namespaces, links, shaping
#   util-linux mount     nsenter, mount
#   e2fsprogs xfsprogs   file systems for nodes' stores: small ones that get full, and xfs
#   libdevmapper1.02.1   linked by the classic engine
#   libsystemd0          likewise
#   mktorrent            another program's .torrent files, to compare ours with
#   aria2 transmission-daemon qbittorrent-nox   BitTorrent clients of others: they download from us, and give back
#   opentracker          somebody else's tracker, likewise
#   git ca-certificates  version stamp; TLS to the Go module proxy
packages="runc busybox-static mmdebstrap fuse3 iptables iproute2 util-linux mount e2fsprogs xfsprogs libdevmapper1.02.1 libsystemd0 mktorrent aria2 transmission-daemon qbittorrent-nox opentracker git ca-certificates"

say() { echo "tools: $*" >&2; }

apt_packages() {
	command -v dpkg-query >/dev/null || { say "not a Debian system: install the equivalents of: $packages"; return 0; }
	local missing="" p
	for p in $packages; do
		[ "$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null)" = installed ] || missing="$missing $p"
	done
	[ -n "$missing" ] || return 0
	if [ "$(id -u)" != 0 ]; then
		say "missing packages, install them as root: apt-get install --no-install-recommends$missing"
		return 0
	fi
	say "installing$missing"
	apt_update
	# shellcheck disable=SC2086
	DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $missing >&2
}

# apt_update refreshes the package lists; a broken third-party source must not stop us, Debian's own will be told by the install.
apt_update() { apt-get update -qq >&2 || say "apt-get update reported errors, going on with what it got"; }

# fresh NAME SPEC: is build/bin/NAME there and made from SPEC?
fresh() { [ -x "$bin/$1" ] && [ "$(cat "$stamps/$1" 2>/dev/null)" = "$2" ]; }

# proves NAME PATH MODULE VERSION: does the binary's build information name this package at this version?
proves() {
	[ -x "$bin/$1" ] || return 1
	go version -m "$bin/$1" 2>/dev/null | awk -v path="$2" -v mod="$3" -v version="$4" '
		$1 == "path" && $2 == path { p = 1 }
		$1 == "mod" && $2 == mod && $3 == version { m = 1 }
		END { exit !(p && m) }'
}

# tool NAME MODULE VERSION PATH [LDFLAGS]
tool() {
	local name=$1 module=$2 version=$3 path=$4 ldflags="-s -w ${5:-}"
	local spec="$path@$version $ldflags"
	fresh "$name" "$spec" && return 0
	if ! [ -e "$stamps/$name" ] && proves "$name" "$path" "$module" "$version"; then
		echo "$spec" >"$stamps/$name"
		return 0
	fi
	say "building $name $version"
	rm -f "$stamps/$name"
	GOBIN=$bin go install -ldflags "$ldflags" "$path@$version"
	echo "$spec" >"$stamps/$name"
}

# The docker CLI has no go.mod: it is built in a module of its own. Its main package has files with language features newer
# than the go1.16 that the compiler assumes for such a module, hence -lang.
docker_cli() {
	local spec="github.com/docker/cli/cmd/docker@$DOCKER_CLI $(cksum <test/tools/dockercli/go.sum)"
	fresh docker "$spec" && return 0
	if ! [ -e "$stamps/docker" ] && proves docker github.com/docker/cli/cmd/docker github.com/docker/cli "$DOCKER_CLI"; then
		echo "$spec" >"$stamps/docker"
		return 0
	fi
	say "building docker $DOCKER_CLI"
	rm -f "$stamps/docker"
	local version=${DOCKER_CLI#v}
	(cd test/tools/dockercli && go build -trimpath -gcflags=github.com/docker/cli/cmd/docker=-lang=go1.26 \
		-ldflags "-s -w -X github.com/docker/cli/cli/version.Version=${version%+*}" -o "$bin/docker" github.com/docker/cli/cmd/docker)
	echo "$spec" >"$stamps/docker"
}

# The classic engine and its own containerd, unpacked beside the system: nothing is installed or started.
classic() {
	local spec="debian docker.io $CLASSIC" version
	[ -x build/classic/usr/sbin/dockerd ] && [ -x build/classic/usr/bin/containerd ] &&
		[ "$(cat "$stamps/classic" 2>/dev/null)" = "$spec" ] && return 0
	if ! command -v apt-get >/dev/null; then
		say "no apt-get here: the classic engine is not installed, its tests will be skipped"
		return 0
	fi
	say "unpacking Debian's docker.io into build/classic"
	rm -rf build/classic "$stamps/classic"
	mkdir -p build/classic/deb
	local get=(apt-get -qq -o APT::Sandbox::User=root download docker.io containerd)
	if ! (cd build/classic/deb && "${get[@]}") >&2; then
		[ "$(id -u)" = 0 ] || { say "apt-get download docker.io failed: run apt-get update as root"; return 1; }
		apt_update
		(cd build/classic/deb && "${get[@]}") >&2
	fi
	local deb
	for deb in build/classic/deb/*.deb; do dpkg-deb -x "$deb" build/classic; done
	rm -rf build/classic/deb build/classic/usr/share
	version=$(build/classic/usr/sbin/dockerd --version)
	case $version in
	*" $CLASSIC."*) ;;
	*) say "note: Debian's engine here is '$version', the tests were written for $CLASSIC" ;;
	esac
	echo "$spec" >"$stamps/classic"
}

vuln() {
	if ! go run ./test/tools/reachable https://vuln.go.dev/index/db.json 2>/dev/null; then
		say "govulncheck skipped: its database, vuln.go.dev, cannot be reached from here"
		return 3
	fi
	tool govulncheck golang.org/x/vuln $GOVULNCHECK golang.org/x/vuln/cmd/govulncheck
}

case ${1:-} in
apt) apt_packages ;;
servers)
	containerd=github.com/containerd/containerd/v2
	for name in containerd ctr containerd-shim-runc-v2; do tool $name $containerd $CONTAINERD $containerd/cmd/$name; done
	tool registry github.com/distribution/distribution/v3 $REGISTRY github.com/distribution/distribution/v3/cmd/registry
	moby=github.com/moby/moby/v2
	tool dockerd $moby $MOBY $moby/cmd/dockerd "-X $moby/dockerversion.Version=$MOBY_VERSION"
	tool docker-proxy $moby $MOBY $moby/cmd/docker-proxy
	docker_cli
	classic
	;;
lint) tool staticcheck honnef.co/go/tools $STATICCHECK honnef.co/go/tools/cmd/staticcheck ;;
vuln) vuln ;;
*)
	sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"
	exit 2
	;;
esac
