package origin

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// htpasswd is the line for user "u" with password "p" (bcrypt, cost 5).
const htpasswd = "u:$2y$05$ezXWkcQnjUOPdKnQBo/m7Ow/tZUbB.diXn22IjLEoFvhTvC8cQ/fi\n"

// real is the distribution registry with the content in it.
type real struct {
	content
	host string
	ca   []byte // PEM, "" without TLS
	stop func()
}

func registryBinary(t *testing.T) string {
	t.Helper()
	dirs := []string{os.Getenv("QUAY_TEST_BIN"), filepath.Join("..", "..", "build", "bin")}
	for _, dir := range dirs {
		if path := filepath.Join(dir, "registry"); dir != "" {
			if _, err := os.Stat(path); err == nil {
				return path
			}
		}
	}
	t.Skipf("the distribution registry is in none of %q: `make test` installs it, or set QUAY_TEST_BIN", dirs)
	return ""
}

// startRegistry starts one on a free port of loopback; secure is TLS by a CA of its own and the login u:p.
func startRegistry(t *testing.T, secure bool) *real {
	t.Helper()
	binary, dir := registryBinary(t), t.TempDir()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &real{content: newContent(), host: l.Addr().String()}
	l.Close()
	conf := fmt.Sprintf("version: 0.1\nlog: {level: error}\nstorage: {filesystem: {rootdirectory: %s/data}}\nhttp:\n  addr: %s\n", dir, r.host)
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{}}}
	scheme := "http"
	if secure {
		scheme = "https"
		cert, key := selfSigned(t)
		r.ca = cert
		for name, text := range map[string][]byte{"cert.pem": cert, "key.pem": key, "htpasswd": []byte(htpasswd)} {
			if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		conf += fmt.Sprintf("  tls: {certificate: %[1]s/cert.pem, key: %[1]s/key.pem}\nauth: {htpasswd: {realm: test, path: %[1]s/htpasswd}}\n", dir)
		pool := x509.NewCertPool()
		pool.AppendCertsFromPEM(cert)
		client.Transport.(*http.Transport).TLSClientConfig.RootCAs = pool
	}
	if err := os.WriteFile(filepath.Join(dir, "config.yml"), []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary, "serve", filepath.Join(dir, "config.yml"))
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr, cmd.Env = &out, &out, append(os.Environ(), "OTEL_TRACES_EXPORTER=none")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stopped := false
	r.stop = func() {
		if !stopped {
			stopped = true
			cmd.Process.Kill()
			cmd.Wait()
		}
	}
	t.Cleanup(func() {
		r.stop()
		if t.Failed() {
			t.Logf("registry: %s", out.String())
		}
	})
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if conn, err := net.Dial("tcp", r.host); err == nil {
			conn.Close()
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("the registry does not start: %v\n%s", err, out.String())
		}
	}
	defer client.CloseIdleConnections()
	base := scheme + "://" + r.host + "/v2/test/image/"
	for _, blob := range [][]byte{r.layer, ocispec.DescriptorEmptyJSON.Data} {
		location := push(t, client, http.MethodPost, base+"blobs/uploads/", "", nil).Header.Get("Location")
		u, err := url.Parse(location)
		if err != nil {
			t.Fatal(err)
		}
		q := u.Query()
		q.Set("digest", string(digest.FromBytes(blob)))
		u.RawQuery = q.Encode()
		push(t, client, http.MethodPut, u.String(), "application/octet-stream", blob)
	}
	push(t, client, http.MethodPut, base+"manifests/latest", r.desc.MediaType, r.manifest)
	return r
}

func push(t *testing.T, c *http.Client, method, url, mediaType string, body []byte) *http.Response {
	t.Helper()
	req, _ := http.NewRequest(method, url, bytes.NewReader(body))
	req.SetBasicAuth("u", "p")
	req.Header.Set("Content-Type", mediaType)
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode >= 300 {
		t.Fatalf("%s %s: %s", method, url, resp.Status)
	}
	return resp
}

func selfSigned(t *testing.T) (cert, key []byte) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, _ := x509.MarshalPKCS8PrivateKey(private)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})
}

// dockerConfig is a folder with a login, as `docker login` writes it.
func dockerConfig(t *testing.T, host, user, secret string) string {
	t.Helper()
	dir := t.TempDir()
	text := fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, host, base64.StdEncoding.EncodeToString([]byte(user+":"+secret)))
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestRegistryPlain: plain HTTP on loopback needs no flag.
func TestRegistryPlain(t *testing.T) {
	reg := startRegistry(t, false)
	suite(t, fixture{content: reg.content, access: public, repository: func(t *testing.T) *Repository {
		return open(t, newClient(t, Options{}, nil), reg.host+"/test/image")
	}})
}

// TestRegistrySecure: TLS by a CA in certs.d, in both layouts, and a login of docker's.
func TestRegistrySecure(t *testing.T) {
	reg := startRegistry(t, true)
	name := reg.host + "/test/image"
	login := dockerConfig(t, reg.host, "u", "p")
	docker := certs(t, reg.host, "ca.crt", reg.ca)
	containerd := certs(t, strings.Replace(reg.host, ":", "_", 1)+"_", "hosts.toml",
		fmt.Appendf(nil, "server = \"https://%s\"\nca = %q\n", reg.host, filepath.Join(docker, reg.host, "ca.crt")))
	for layout, root := range map[string]string{"docker": docker, "containerd": containerd} {
		t.Run(layout, func(t *testing.T) {
			suite(t, fixture{content: reg.content, access: private, repository: func(t *testing.T) *Repository {
				return open(t, newClient(t, Options{HostDirs: []string{t.TempDir(), root}, DockerConfigDir: login}, nil), name)
			}})
		})
	}
	try := func(t *testing.T, o Options) error {
		_, _, err := open(t, newClient(t, o, nil), name).Manifest(testContext(t), "latest")
		return err
	}
	t.Run("no login", func(t *testing.T) {
		err := try(t, Options{HostDirs: []string{docker}})
		if !errors.Is(err, ErrDenied) || !strings.Contains(err.Error(), "docker login "+reg.host) || !strings.Contains(err.Error(), name) {
			t.Fatalf("got %v", err)
		}
	})
	t.Run("no login, the host twice", func(t *testing.T) {
		// server and host are the same, and only the latter has the CA: containerd's documentation has it so.
		twice := certs(t, reg.host, "hosts.toml", fmt.Appendf(nil, "server = \"https://%[1]s\"\n[host.\"https://%[1]s\"]\n  capabilities = [\"pull\", \"resolve\"]\n  ca = %[2]q\n",
			reg.host, filepath.Join(docker, reg.host, "ca.crt")))
		if err := try(t, Options{HostDirs: []string{twice}}); !errors.Is(err, ErrDenied) {
			t.Fatalf("got %v", err)
		}
	})
	t.Run("wrong password", func(t *testing.T) {
		err := try(t, Options{HostDirs: []string{docker}, DockerConfigDir: dockerConfig(t, reg.host, "u", "wrong")})
		if !errors.Is(err, ErrDenied) || !strings.Contains(err.Error(), "login of u") {
			t.Fatalf("got %v", err)
		}
	})
	t.Run("another CA", func(t *testing.T) {
		other, _ := selfSigned(t)
		err := try(t, Options{HostDirs: []string{certs(t, reg.host, "ca.crt", other)}, DockerConfigDir: login})
		if !errors.Is(err, ErrTLS) || !strings.Contains(err.Error(), "ca.crt") {
			t.Fatalf("got %v", err)
		}
	})
	t.Run("another CA, insecure", func(t *testing.T) {
		other, _ := selfSigned(t)
		if err := try(t, Options{HostDirs: []string{certs(t, reg.host, "ca.crt", other)}, DockerConfigDir: login, Insecure: true}); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("stopped", func(t *testing.T) {
		c := newClient(t, Options{HostDirs: []string{docker}, DockerConfigDir: login}, func(l *limits) { *l = defaultLimits })
		reg.stop()
		start := time.Now()
		_, _, err := open(t, c, name).Manifest(testContext(t), "latest")
		if !errors.Is(err, ErrUnavailable) {
			t.Fatalf("got %v", err)
		}
		if d := time.Since(start); d > 3*time.Second {
			t.Errorf("noticed only after %v", d)
		}
	})
}
