package main

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// patience is how long something in the network may keep us waiting.
type patience struct {
	connect time.Duration // for its address and a connection, and again for TLS
	answer  time.Duration // from the request to the answer's first byte
	stall   time.Duration // from one piece of the answer to the next
}

// usualPatience is for people's networks: what does not answer by then is out of reach, and said to be.
var usualPatience = patience{connect: 5 * time.Second, answer: 10 * time.Second, stall: 20 * time.Second}

// openURL opens a path, relative to dir, or a URL. What cannot be reached, or stops sending, is
// fault.Unavailable or fault.Timeout; the latter may come from the reader.
func openURL(ctx context.Context, w patience, where, dir string) (io.ReadCloser, error) {
	u, err := url.Parse(where)
	if err != nil {
		return nil, fault.Wrap(err, fault.Invalid, where, "is no URL")
	}
	switch u.Scheme {
	case "", "file":
		path := u.Path
		if !filepath.IsAbs(path) {
			path = filepath.Join(dir, path)
		}
		f, err := os.Open(path)
		if err != nil {
			return nil, fault.Wrap(err, fault.NotFound, where, "cannot be read")
		}
		return f, nil
	case "http", "https":
		return w.get(ctx, where)
	}
	return nil, fault.New(fault.Invalid, where, "is neither a path nor a file, http or https URL")
}

// client is for one file after the other.
func (w patience) client() *http.Client {
	return &http.Client{
		Transport: &http.Transport{
			Proxy:                 http.ProxyFromEnvironment,
			DialContext:           (&net.Dialer{Timeout: w.connect}).DialContext,
			TLSHandshakeTimeout:   w.connect,
			ResponseHeaderTimeout: w.answer,
			ForceAttemptHTTP2:     true,
			DisableKeepAlives:     true, // one file, then nothing is left open
		},
		CheckRedirect: noWayBack,
	}
}

func (w patience) get(ctx context.Context, where string) (io.ReadCloser, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, where, nil)
	if err != nil {
		cancel(nil)
		return nil, fault.Wrap(err, fault.Invalid, where, "is no URL")
	}
	resp, err := w.client().Do(req)
	if err != nil {
		defer cancel(nil)
		if cause := context.Cause(ctx); cause != nil {
			return nil, cause
		}
		var of *url.Error
		if errors.As(err, &of) { // without the address, which the fault names
			err = of.Err
		}
		return nil, fault.Wrap(err, fault.Unavailable, where, "cannot be fetched")
	}
	if resp.StatusCode != http.StatusOK {
		defer cancel(nil)
		return nil, errors.Join(fault.New(fault.Unavailable, where, "cannot be fetched: %s", resp.Status), resp.Body.Close())
	}
	stall := time.AfterFunc(w.stall, func() {
		cancel(fault.New(fault.Timeout, where, "sent nothing for %s", w.stall))
	})
	stall.Stop() // runs while a Read does
	return &answer{ctx: ctx, cancel: cancel, body: resp.Body, stall: stall, bound: w.stall}, nil
}

// noWayBack keeps redirections from leading out of https: the checksum would come from anybody.
func noWayBack(to *http.Request, via []*http.Request) error {
	if len(via) >= 10 {
		return errors.New("more than 10 redirections")
	}
	if via[len(via)-1].URL.Scheme == "https" && to.URL.Scheme != "https" {
		return errors.New("redirected from https to " + to.URL.Scheme)
	}
	return nil
}

// answer is the body of an HTTP answer, which fails when nothing comes for too long.
type answer struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	body   io.ReadCloser
	stall  *time.Timer
	bound  time.Duration
}

func (a *answer) Read(b []byte) (int, error) {
	a.stall.Reset(a.bound)
	n, err := a.body.Read(b)
	a.stall.Stop()
	if cause := context.Cause(a.ctx); err != nil && !errors.Is(err, io.EOF) && cause != nil {
		err = cause
	}
	return n, err
}

func (a *answer) Close() error {
	a.stall.Stop()
	defer a.cancel(nil)
	return a.body.Close()
}

// counted shows how much has come, and ends with its context.
type counted struct {
	ctx context.Context
	r   io.Reader
	p   *progress
	n   int64
}

func (c *counted) Read(b []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := c.r.Read(b)
	if before := c.n >> 24; (c.n+int64(n))>>24 != before {
		c.p.note(gib(c.n + int64(n)))
	}
	c.n += int64(n)
	return n, err
}
