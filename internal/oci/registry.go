package oci

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/disk"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/filelock"
)

// Bounds of waiting for a registry.
const (
	connectTime = 30 * time.Second
	answerTime  = 60 * time.Second // from a request to the first bytes of its answer
	stallTime   = 60 * time.Second // without a byte of a layer
	tries       = 5                // in a row that bring nothing
)

// firstPause is the wait before the second try; each one after it is twice as long. Tests shorten it.
var firstPause = 500 * time.Millisecond

// registry is a repository of a registry, with credentials.
type registry struct {
	repo   name.Repository
	client *http.Client
	remote *remote.Puller
	cache  string
}

func defaultTransport() http.RoundTripper {
	return &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: connectTime, KeepAlive: 30 * time.Second}).DialContext,
		ForceAttemptHTTP2:     true,
		TLSHandshakeTimeout:   connectTime,
		ResponseHeaderTimeout: answerTime,
		IdleConnTimeout:       90 * time.Second,
		MaxIdleConnsPerHost:   parallel,
		DisableCompression:    true, // layers come as they are, and their digests are of that
	}
}

func (p *Puller) fromRegistry(ctx context.Context, ref name.Reference) (resolved, error) {
	keychain := p.Keychain
	if keychain == nil {
		keychain = authn.DefaultKeychain
	}
	repo := ref.Context()
	auth, err := authn.Resolve(ctx, keychain, repo)
	if err != nil {
		return resolved{}, fault.Wrap(err, fault.Unavailable, repo.RegistryStr(), "its credentials cannot be had from Docker's configuration").
			WithHint("check ~/.docker/config.json and the credential helper that it names")
	}
	inner := p.Transport
	if inner == nil {
		inner = defaultTransport()
	}
	inner = transport.NewUserAgent(transport.NewRetry(inner), "banger")
	rt, err := transport.NewWithContext(ctx, repo.Registry, auth, inner, []string{repo.Scope(transport.PullScope)})
	if err != nil {
		return resolved{}, classify(ctx, err, display(ref))
	}
	puller, err := remote.NewPuller(remote.WithTransport(rt))
	if err != nil {
		return resolved{}, err
	}
	at := &registry{repo: repo, client: &http.Client{Transport: rt}, remote: puller, cache: p.Cache}
	d, err := puller.Get(ctx, ref)
	if err != nil {
		return resolved{}, err
	}
	return choose(ctx, at, display(ref), d.Descriptor, 0)
}

func (r *registry) document(ctx context.Context, d v1.Descriptor) ([]byte, error) {
	if d.Size > maxDocument {
		return nil, corrupt("%s claims %d bytes, which no manifest has", d.Digest, d.Size)
	}
	if d.MediaType.IsConfig() {
		resp, err := r.get(ctx, d.Digest, 0)
		if err != nil {
			return nil, err
		}
		defer resp.Body.Close()
		return readDocument(resp.Body, d.Digest.String())
	}
	m, err := r.remote.Get(ctx, r.repo.Digest(d.Digest.String()))
	if err != nil {
		return nil, err
	}
	return m.Manifest, nil
}

// get asks for a blob from an offset on.
func (r *registry) get(ctx context.Context, h v1.Hash, from int64) (*http.Response, error) {
	u := url.URL{Scheme: r.repo.Scheme(), Host: r.repo.RegistryStr(), Path: fmt.Sprintf("/v2/%s/blobs/%s", r.repo.RepositoryStr(), h)}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	if from > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", from))
	}
	resp, err := r.client.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode == http.StatusRequestedRangeNotSatisfiable {
		return resp, nil
	}
	if err := transport.CheckError(resp, http.StatusOK, http.StatusPartialContent); err != nil {
		return nil, errors.Join(err, resp.Body.Close())
	}
	return resp, nil
}

func (r *registry) layer(d v1.Descriptor, diffID v1.Hash) *layer {
	b := &blob{registry: r, digest: d.Digest, size: d.Size, path: filepath.Join(r.cache, d.Digest.Algorithm+"-"+d.Digest.Hex)}
	return &layer{digest: d.Digest, diffID: diffID, size: d.Size, open: b.open, blob: b}
}

// partSuffix marks a blob of the cache that is not whole, or not checked.
const partSuffix = ".part"

// blob is a layer of a registry, and its place in the cache. It has its name there once it is whole and was
// checked; until then it is the part, which is locked while somebody works on it and goes on from where it
// ends.
type blob struct {
	registry *registry
	digest   v1.Hash
	size     int64
	path     string
}

// open reads the blob of the cache.
func (b *blob) open() (io.ReadCloser, error) { return os.Open(b.path) }

// bring makes the blob be in the cache: check is given the whole file and says whether it is what it should
// be. What is not is removed.
func (b *blob) bring(ctx context.Context, report *reporter, check func(path string) error) error {
	for range 2 {
		st, err := os.Stat(b.path)
		if err == nil && st.Size() == b.size {
			report.done.Add(b.size)
			report.cached.Add(b.size)
			// A disk can fail, and anybody may write to a cache: it is checked like what was just fetched.
			now := time.Now()
			err := check(b.path)
			if err == nil {
				return os.Chtimes(b.path, now, now) // Sweep goes by the time of use
			}
			if !fault.Is(err, fault.Corrupt) {
				return err
			}
			report.done.Add(-b.size)
			report.cached.Add(-b.size)
			if err := os.Remove(b.path); err != nil {
				return err
			}
		}
		done, err := b.fetch(ctx, report, check)
		if done || err != nil {
			return err
		}
	}
	return fault.New(fault.Busy, b.path, "is replaced again and again by another program")
}

// fetch downloads the blob under the part's lock. It is not done if another process was faster.
func (b *blob) fetch(ctx context.Context, report *reporter, check func(path string) error) (done bool, err error) {
	if err := os.MkdirAll(filepath.Dir(b.path), 0o700); err != nil {
		return false, err
	}
	part := b.path + partSuffix
	f, err := os.OpenFile(part, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return false, err
	}
	if err := lock(ctx, f, unix.LOCK_EX); err != nil {
		return false, err
	}
	defer f.Close()
	// Whoever held it has renamed or removed the file that was opened here.
	var mine, named unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &mine); err != nil {
		return false, os.NewSyscallError("fstat", err)
	}
	if err := unix.Lstat(part, &named); err != nil || mine.Ino != named.Ino || mine.Dev != named.Dev {
		return false, nil
	}
	if err := b.download(ctx, f, report); err != nil {
		return false, err
	}
	if err := check(part); err != nil {
		if fault.Is(err, fault.Corrupt) {
			err = errors.Join(err, os.Remove(part))
		}
		return false, err
	}
	return true, os.Rename(part, b.path)
}

// lock waits for the lock of a file, LOCK_EX or LOCK_SH, and closes it if it does not get that.
func lock(ctx context.Context, f *os.File, how int) error {
	err := filelock.Wait(ctx, f, how)
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		_ = f.Close() // nothing was written to it
		return context.Cause(ctx)
	}
	return errors.Join(err, f.Close())
}

// download appends what is missing, going on after interruptions.
func (b *blob) download(ctx context.Context, f *os.File, report *reporter) error {
	st, err := f.Stat()
	if err != nil {
		return err
	}
	have := st.Size()
	if have > b.size {
		have = 0
		if err := f.Truncate(0); err != nil {
			return err
		}
	}
	if err := disk.CheckRoom(filepath.Dir(b.path), b.size-have); err != nil {
		return err
	}
	report.done.Add(have)
	report.cached.Add(have)
	pause := firstPause
	// A registry without ranges begins anew each time: what counts is that more is here than ever.
	best := have
	for fails := 0; have < b.size; {
		have, err = b.once(ctx, f, have, report)
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case err == nil && have == b.size:
			return nil
		case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT), fault.Is(err, fault.Corrupt), isRefusal(err):
			return err
		case have > best:
			best, fails, pause = have, 0, firstPause
		default:
			fails++
		}
		if fails >= tries {
			if err == nil {
				err = io.ErrUnexpectedEOF
			}
			return fault.Wrap(err, fault.Unavailable, b.registry.repo.Name(), "a layer did not come: %d of %d bytes are here after %d tries", have, b.size, tries).
				WithHint("pull again: what was fetched is kept")
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		pause *= 2
	}
	return nil
}

// isRefusal tells an answer that trying again does not change.
func isRefusal(err error) bool {
	var e *transport.Error
	return errors.As(err, &e) && e.StatusCode/100 == 4 && e.StatusCode != http.StatusTooManyRequests && e.StatusCode != http.StatusRequestTimeout
}

// once makes one request and appends what comes. It returns how much of the blob is in f then.
func (b *blob) once(ctx context.Context, f *os.File, have int64, report *reporter) (int64, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stalled := time.AfterFunc(answerTime+stallTime, func() {
		cancel(fault.New(fault.Timeout, b.registry.repo.Name(), "nothing came for %s", stallTime))
	})
	defer stalled.Stop()
	resp, err := b.registry.get(ctx, b.digest, have)
	if err != nil {
		return have, err
	}
	defer resp.Body.Close()
	// A registry that knows no ranges sends all of it, and one that does says which part this is.
	whole := resp.StatusCode == http.StatusOK ||
		!strings.HasPrefix(resp.Header.Get("Content-Range"), fmt.Sprintf("bytes %d-", have))
	if whole && have > 0 {
		report.done.Add(-have)
		report.cached.Store(max(0, report.cached.Load()-have))
		have = 0
		if err := f.Truncate(0); err != nil {
			return have, err
		}
	}
	if resp.StatusCode != http.StatusOK && whole {
		return have, fmt.Errorf("the registry answered a request for a part with %s", resp.Status)
	}
	body := io.LimitReader(resp.Body, b.size-have+1)
	buffer := make([]byte, 256<<10)
	for {
		n, err := body.Read(buffer)
		if n > 0 {
			stalled.Reset(stallTime)
			if have+int64(n) > b.size {
				return have, errors.Join(corrupt("layer %s has more bytes than its manifest says (%d)", b.digest, b.size), f.Truncate(0))
			}
			if _, err := f.WriteAt(buffer[:n], have); err != nil {
				return have, err
			}
			have += int64(n)
			report.done.Add(int64(n))
		}
		if errors.Is(err, io.EOF) {
			return have, nil
		}
		if err != nil {
			if ctx.Err() != nil {
				err = context.Cause(ctx)
			}
			return have, err
		}
	}
}
