package origin

import (
	"crypto/subtle"
	"fmt"

	"github.com/distribution/reference"
	"github.com/docker/cli/cli/config"
	"github.com/docker/cli/cli/config/credentials"
)

// hubKey is the name under which docker keeps the login of Docker Hub, since long before there was a /v2.
const hubKey = "https://index.docker.io/v1/"

// dockerCredentials looks logins up as docker does: helper of the host, then the store for all, then the file itself.
func dockerCredentials(dir string) func(string) (string, string, error) {
	return func(host string) (username, secret string, err error) {
		from := dir
		if from == "" {
			from = config.Dir()
		}
		file, err := config.Load(from)
		if err != nil {
			return "", "", fmt.Errorf("docker's configuration in %s cannot be read: %w", from, err)
		}
		if !file.ContainsAuth() {
			file.CredentialsStore = credentials.DetectDefaultStore(file.CredentialsStore)
		}
		login, err := file.GetAuthConfig(loginKey(host))
		if err != nil {
			return "", "", fmt.Errorf("docker's credential helper has no answer for %s: %w", loginKey(host), err)
		}
		if login.IdentityToken != "" {
			return "", login.IdentityToken, nil
		}
		return login.Username, login.Password, nil
	}
}

// Accepted reports whether access, as Repository.Access told it when ref was last read, names a credential that this client
// holds for ref's registry now. It lets a caller with the registry out of reach see what the registry would have let it see,
// and nothing else: without such a credential, or with another, the answer is no. It asks no registry.
func (c *Client) Accepted(ref reference.Named, access string) bool {
	if ref == nil || access == "" || access == Public {
		return false
	}
	hosts, err := c.hostsOf(reference.Domain(ref))
	if err != nil {
		return false
	}
	for _, h := range hosts {
		names := []string{h.static}
		if user, secret, err := c.options.Credentials(h.Host); err == nil && secret != "" {
			names = append(names, accessName(h.name, user, secret))
		}
		for _, name := range names {
			if subtle.ConstantTimeCompare([]byte(name), []byte(access)) == 1 {
				return true
			}
		}
	}
	return false
}

// loginKey is the name of a host in docker's configuration.
func loginKey(host string) string {
	switch host {
	case "docker.io", "index.docker.io", "registry-1.docker.io":
		return hubKey
	}
	return host
}

// loginCommand is what a person runs to log in to a host.
func loginCommand(host string) string {
	if loginKey(host) == hubKey {
		return "docker login"
	}
	return "docker login " + host
}
