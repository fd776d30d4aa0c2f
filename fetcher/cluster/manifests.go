package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
	"unicode"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// What members do for each other at registries: a node without a way to one (a
// bastion) asks a member that may have one what a name stands for, and to fetch
// a blob that no member has yet.

const (
	// maxManifest bounds a manifest's body in bytes: what the store keeps and
	// the registry client reads at most.
	maxManifest = 8 << 20
	// maxManifestAnswer bounds an answer with a manifest in it: its body in
	// base64, and an envelope.
	maxManifestAnswer = maxManifest/3*4 + 64<<10
	// maxQuestion bounds a question in bytes. Identity tokens of some
	// registries have several KiB.
	maxQuestion = 64 << 10
	// maxLogin bounds a user's name and a secret, in bytes each.
	maxLogin = 24 << 10
	// maxRefLength bounds a full reference in bytes: 255 of name, 128 of tag or
	// 71 to 135 of digest, and what lies between.
	maxRefLength = 600
	// maxMediaType bounds a media type in bytes (RFC 6838 §4.2: 127 for each half).
	maxMediaType = 256
	// maxSentence bounds the words of a refusal in bytes: they are for a person.
	maxSentence = 1 << 10
	// maxKind bounds the kind of a refusal in bytes.
	maxKind = 32
	// maxAge bounds how long ago a tag was seen.
	maxAge = 10 * 365 * 24 * time.Hour

	// AnswerWithin bounds one question, both for who asks and for who answers
	// it: an answer needs a few round trips to a registry and its token service.
	// A registry that drops packets takes longer than anybody waits for.
	AnswerWithin = 10 * time.Second
	// errandWithin bounds the time until a member has begun an errand: it asks
	// the registry whether the blob is there, and opens it in its store.
	errandWithin = 20 * time.Second
	// errandBeat is how often a member that runs an errand says so; errandDead
	// is when one that says nothing is given up: three beats, two may be lost.
	errandBeat = 5 * time.Second
	errandDead = 3 * errandBeat
	// errandLimit ends an errand that is not done: one that is still wanted
	// is asked for again. 30 minutes are 45 GB at 200 Mbit/s.
	errandLimit = 30 * time.Minute

	// questions and errands bound how many are answered at once, in all and for
	// one member. A pull of a bastion has one question and four errands under way.
	questions, questionsEach = 32, 8
	errands, errandsEach     = 128, 32
)

// Errors of questions to members.
var (
	// ErrBusy: the member has too much to do for others just now.
	ErrBusy = errors.New("the member is busy")
	// ErrNoErrands: the member does nothing of that kind for others.
	ErrNoErrands = errors.New("the member asks no registry for others")
)

// Login is a registry credential of somebody on the node that asks. The member
// that gets it uses it for that question or errand alone and keeps it in memory only.
type Login struct {
	// Username is empty when Secret is an identity token.
	Username string `json:"username,omitempty"`
	Secret   string `json:"secret"`
}

// Question asks a member for a manifest.
type Question struct {
	// Ref is the full reference, with a tag or a digest.
	Ref string `json:"ref"`
	// Digest, when set, says that the manifest with that digest is wanted and nothing
	// else: who asks may have it already, for an index names it, so the member
	// gives it from its store if it can.
	Digest digest.Digest `json:"digest,omitempty"`
	// Held, with Digest, is for the member's store alone: no registry is asked.
	Held bool `json:"held,omitempty"`
	// Insecure allows plain HTTP and unverified TLS to the registry.
	Insecure bool `json:"insecure,omitempty"`
	// Login is the only credential the registry is asked with; nil: none.
	Login *Login `json:"login,omitempty"`
	// Node says that the node itself asks, not one of its users: it is given what
	// the member saw without the registry's word.
	Node bool `json:"node,omitempty"`
	// Offline says that what was seen will do when the registry is away: the
	// member tries it for a moment only.
	Offline bool `json:"offline,omitempty"`
}

// The values of Answer.Source and Answer.Access.
const (
	FromRegistry = "registry" // the registry said so just now
	FromCache    = "cache"    // the member saw it once, and holds the bytes

	AccessPublic = "public" // the registry gave it without a credential
	AccessLogin  = "login"  // it accepted the login of the question
)

// Answer is a manifest, or why there is none.
type Answer struct {
	MediaType string        `json:"media_type,omitempty"`
	Digest    digest.Digest `json:"digest,omitempty"`
	Body      []byte        `json:"body,omitempty"`
	// Source is FromRegistry or FromCache. Access is how the registry gave it: AccessPublic,
	// AccessLogin, or "" when that is not known.
	Source string `json:"source,omitempty"`
	Access string `json:"access,omitempty"`
	// Age is how long ago the registry said so, in seconds. Never a time of day:
	// clocks may be wrong by hours.
	Age int64 `json:"age,omitempty"`
	// Refusal is set in place of all that.
	Refusal *Refusal `json:"refusal,omitempty"`
}

// Refusal says why there is no answer: Kind for programs, as the two sides agree,
// Message for people.
type Refusal struct {
	Kind    string `json:"kind"`
	Message string `json:"message"`
}

func (r *Refusal) Error() string { return r.Message }

// Errand asks a member to fetch a blob from its registry, so that the swarm has it.
type Errand struct {
	// Ref names the image, or the repository alone.
	Ref      string        `json:"ref"`
	Digest   digest.Digest `json:"digest"`
	Size     int64         `json:"size"`
	Insecure bool          `json:"insecure,omitempty"`
	Login    *Login        `json:"login,omitempty"`
}

// The states of an errand, as the member that runs it tells them, a line of JSON each.
const (
	errandBegun = "fetching"
	errandDone  = "complete"
)

type beat struct {
	State   string   `json:"state,omitempty"`
	Refusal *Refusal `json:"refusal,omitempty"`
}

// Errands is what a node does at registries for members that cannot reach them.
// Its methods check nothing of the messages' form, which is done before, but all
// of what they mean.
type Errands interface {
	// Resolve answers a question.
	Resolve(ctx context.Context, from string, q Question) Answer
	// RunErrand fetches a blob; it calls begun once the node takes part in it,
	// and returns when the node holds all of it. An error that is a *Refusal is told
	// as it is. ctx ends when who asked has gone.
	RunErrand(ctx context.Context, from string, e Errand, begun func()) error
}

func checkLogin(l *Login) error {
	if l != nil && (l.Secret == "" || len(l.Secret) > maxLogin || len(l.Username) > maxLogin) {
		return fmt.Errorf("%w: credential", ErrMessage)
	}
	return nil
}

// checkRef takes only references in their full form: what one node takes for a
// host must not be a part of a name on Docker Hub to another.
func checkRef(s string) (reference.Named, error) {
	if len(s) > maxRefLength {
		return nil, fmt.Errorf("%w: reference of %d bytes", ErrMessage, len(s))
	}
	ref, err := reference.ParseNamed(s)
	if err != nil {
		return nil, fmt.Errorf("%w: reference %.80q: %v", ErrMessage, s, err)
	}
	return ref, nil
}

func (q *Question) validate() error {
	ref, err := checkRef(q.Ref)
	if err != nil {
		return err
	}
	if reference.IsNameOnly(ref) {
		return fmt.Errorf("%w: reference %.80q without tag and digest", ErrMessage, q.Ref)
	}
	if q.Digest != "" {
		if err := q.Digest.Validate(); err != nil {
			return fmt.Errorf("%w: %v", ErrMessage, err)
		}
		if d, ok := ref.(reference.Digested); !ok || d.Digest() != q.Digest {
			return fmt.Errorf("%w: the reference names something else than the digest", ErrMessage)
		}
	}
	return checkLogin(q.Login)
}

func (e *Errand) validate() error {
	if _, err := checkRef(e.Ref); err != nil {
		return err
	}
	if err := e.Digest.Validate(); err != nil {
		return fmt.Errorf("%w: %v", ErrMessage, err)
	}
	if e.Size < 0 || e.Size > maxBlobSize {
		return fmt.Errorf("%w: blob of %d bytes", ErrMessage, e.Size)
	}
	return checkLogin(e.Login)
}

// validate checks an answer to q: whatever the member says, the body has the digest
// that comes with it, and that is the one asked for where one was.
func (a *Answer) validate(q *Question) error {
	if a.Refusal != nil {
		*a = Answer{Refusal: a.Refusal}
		return a.Refusal.validate()
	}
	if err := a.Digest.Validate(); err != nil {
		return fmt.Errorf("%w: %v", ErrMessage, err)
	}
	if len(a.Body) == 0 || len(a.Body) > maxManifest || len(a.MediaType) > maxMediaType {
		return fmt.Errorf("%w: manifest of %d bytes", ErrMessage, len(a.Body))
	}
	if a.Digest.Algorithm().FromBytes(a.Body) != a.Digest {
		return fmt.Errorf("%w: the manifest is not that of %s", ErrMessage, a.Digest)
	}
	if ref, err := reference.ParseNamed(q.Ref); err != nil {
		return err
	} else if d, ok := ref.(reference.Digested); ok && d.Digest() != a.Digest {
		return fmt.Errorf("%w: %s came for %s", ErrMessage, a.Digest, d.Digest())
	}
	if a.Source != FromRegistry && a.Source != FromCache {
		return fmt.Errorf("%w: source %.20q", ErrMessage, a.Source)
	}
	if a.Access != "" && a.Access != AccessPublic && (a.Access != AccessLogin || q.Login == nil) {
		return fmt.Errorf("%w: access %.20q", ErrMessage, a.Access)
	}
	if a.Age < 0 || a.Age > int64(maxAge/time.Second) {
		return fmt.Errorf("%w: seen %d seconds ago", ErrMessage, a.Age)
	}
	return nil
}

// validate also makes the words fit to be printed: one line, no control characters.
func (r *Refusal) validate() error {
	if r.Kind == "" || len(r.Kind) > maxKind || len(r.Message) > maxSentence {
		return fmt.Errorf("%w: refusal", ErrMessage)
	}
	r.Message = printable(r.Message)
	return nil
}

func printable(s string) string {
	return strings.Map(func(c rune) rune {
		if !unicode.IsPrint(c) {
			return ' '
		}
		return c
	}, s)
}

// NewRefusal is a refusal that the other side takes.
func NewRefusal(kind string, err error) *Refusal {
	m := strings.ToValidUTF8(err.Error(), "")
	if len(m) > maxSentence {
		m = strings.ToValidUTF8(m[:maxSentence-len("…")], "") + "…"
	}
	return &Refusal{Kind: kind, Message: printable(m)}
}

// Resolve asks a member for a manifest. The answer is checked in form and against its
// digest; that a tag stands for it is the member's word. The error is ErrBusy,
// ErrNoErrands, or what kept the member from answering; a refusal is no error.
func (c *Cluster) Resolve(ctx context.Context, m Member, q Question) (Answer, error) {
	ctx, cancel := context.WithTimeout(ctx, AnswerWithin)
	defer cancel()
	resp, err := c.post(ctx, m, "/quay/v1/resolve", q)
	if err != nil {
		return Answer{}, err
	}
	defer resp.Body.Close()
	var a Answer
	if err := decodeWithin(resp.Body, maxManifestAnswer, &a); err != nil {
		return Answer{}, err
	}
	if err := a.validate(&q); err != nil {
		return Answer{}, err
	}
	return a, nil
}

// RunErrand has a member fetch a blob. It calls begun when the member has begun, and
// returns nil when that has all of the blob. The member stops when ctx ends. A *Refusal is
// its word; ErrBusy and ErrNoErrands are as of Resolve.
func (c *Cluster) RunErrand(ctx context.Context, m Member, e Errand, begun func()) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	dead := time.AfterFunc(errandWithin, cancel)
	defer dead.Stop()
	resp, err := c.post(ctx, m, "/quay/v1/fetch", e)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	// One line a beat: bounded by what an errand can last.
	lines := json.NewDecoder(io.LimitReader(resp.Body, int64(errandLimit/errandBeat+2)*maxQuestion))
	for {
		var b beat
		if err := lines.Decode(&b); err != nil {
			return fmt.Errorf("member %s broke an errand off: %w", m.ID, err)
		}
		dead.Reset(errandDead)
		switch {
		case b.Refusal != nil:
			if err := b.Refusal.validate(); err != nil {
				return err
			}
			return b.Refusal
		case b.State == errandDone:
			return nil
		case b.State != errandBegun:
			return fmt.Errorf("%w: errand state %.20q", ErrMessage, b.State)
		case begun != nil:
			begun()
			begun = nil
		}
	}
}

// post sends a message to a member, which must be that member; the caller closes
// the answer's body.
func (c *Cluster) post(ctx context.Context, m Member, path string, msg any) (*http.Response, error) {
	body, err := json.Marshal(msg)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+m.Addr.String()+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	// The message may hold a credential. The handshake is over before it is sent,
	// but only a new connection would tell us who it is with: any member may have
	// it, as any may be asked, and nobody else passes the handshake.
	resp, err := c.client.Do(req)
	if err != nil {
		return nil, err
	}
	id, err := c.o.PeerID(*resp.TLS)
	switch {
	case err != nil:
	case id != m.ID:
		err = fmt.Errorf("another node answers at %s", m.Addr)
	case resp.StatusCode == http.StatusTooManyRequests:
		err = ErrBusy
	case resp.StatusCode == http.StatusNotImplemented, resp.StatusCode == http.StatusNotFound:
		err = ErrNoErrands
	case resp.StatusCode != http.StatusOK:
		err = fmt.Errorf("%s answered %s", m.Addr, resp.Status)
	}
	if err != nil {
		_ = resp.Body.Close()
		return nil, err
	}
	return resp, nil
}

// decodeWithin reads one JSON message of at most limit bytes.
func decodeWithin(r io.Reader, limit int64, into any) error {
	b, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return err
	}
	if int64(len(b)) > limit {
		return fmt.Errorf("%w: longer than %d bytes", ErrMessage, limit)
	}
	if err := json.Unmarshal(b, into); err != nil {
		return fmt.Errorf("%w: %v", ErrMessage, err)
	}
	return nil
}
