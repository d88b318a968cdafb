package files

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"git.thaloco.com/thaloco/banger/internal/guest/frame"
)

// Conn is a stream between host and guest. Its Close ends reads and writes.
type Conn interface {
	io.ReadWriteCloser
	SetReadDeadline(time.Time) error
	SetWriteDeadline(time.Time) error
}

// patient is a Conn that waits for a silent peer as long as it may.
type patient struct{ Conn }

func (p patient) Read(b []byte) (int, error) {
	if err := p.SetReadDeadline(time.Now().Add(Silence)); err != nil {
		return 0, err
	}
	return p.Conn.Read(b)
}

func (p patient) Write(b []byte) (int, error) {
	if err := p.SetWriteDeadline(time.Now().Add(Silence)); err != nil {
		return 0, err
	}
	return p.Conn.Write(b)
}

// Error is why a copy failed. The cause of Lost is in the chain.
type Error struct {
	Guest bool // it is the guest that could not go on; else the reason is here
	Lost  bool // the stream broke, or the peer did not keep to the form
	Err   error
}

func (e *Error) Error() string { return e.Err.Error() }

// Unwrap gives the cause.
func (e *Error) Unwrap() error { return e.Err }

func failed(err error) error {
	if err == nil {
		return nil
	}
	var r refusal
	guest := errors.As(err, &r)
	return &Error{Guest: guest, Lost: errors.Is(err, errLost) || errors.Is(err, errForm) || errors.Is(err, os.ErrDeadlineExceeded), Err: err}
}

// splitContents takes the "/." off a path that means what is in a directory.
func splitContents(path string) (string, bool) {
	switch base := filepath.Base(path); {
	case strings.HasSuffix(path, "/."), path == ".", base == "/", base == "..":
		return path, true
	}
	return path, false
}

// Put copies a host's file or directory to a path in the guest, over a stream that the agent has said
// "ok" to, and closes it. A destination that is a directory gets it under its own name; a source that
// ends in "/." is copied without itself. Errors are *Error.
func Put(ctx context.Context, conn Conn, source, target string, o Options) (Result, error) {
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	source, o.Contents = splitContents(source)
	from, err := openSource(source)
	if err != nil {
		return Result{}, failed(err)
	}
	defer from.f.Close()
	w := patient{conn}
	if err := request(w, Request{Put: true, Path: target, Name: from.name, Options: o}); err != nil {
		return Result{}, failed(errors.Join(errLost, err))
	}
	type answer struct {
		Result
		err error
	}
	answered := make(chan answer, 1)
	go func() {
		var a answer
		// No bound on this read: as long as the guest takes what is sent, it need say nothing.
		kind, payload, err := frame.NewReader(conn).Next()
		switch {
		case err != nil:
			a.err = errors.Join(errLost, err)
		case kind != kindResult:
			a.err = fmt.Errorf("%w: a frame of kind %q instead of a result", errForm, kind)
		default:
			if a.Result, a.err = parseResult(payload); a.err != nil {
				a.err = errors.Join(errForm, a.err)
			}
		}
		answered <- a
		if a.err != nil || a.Failed != "" {
			_ = conn.Close() // ends the sending
		}
	}()
	sent := send(w, from, o.Progress)
	var a answer
	if sent != nil {
		_ = conn.SetReadDeadline(time.Now().Add(time.Second)) // the reason may be on its way; if not, sent is it
	} else if err := conn.SetReadDeadline(time.Now().Add(Silence)); err != nil {
		sent = err
	}
	a = <-answered
	switch {
	case a.err == nil && a.Failed != "":
		return a.Result, failed(refusal{a.Result})
	case ctx.Err() != nil && (sent != nil || a.err != nil):
		return a.Result, failed(errors.Join(ctx.Err(), errLost))
	case sent != nil && errors.Is(a.err, errLost):
		return a.Result, failed(errors.Join(errLost, sent))
	case a.err != nil:
		return a.Result, failed(a.err)
	}
	return a.Result, failed(sent)
}

// Get copies a guest's file or directory to a path of the host, as Put does the other way.
func Get(ctx context.Context, conn Conn, source, target string, o Options) (Result, error) {
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	source, o.Contents = splitContents(source)
	c := patient{conn}
	if err := request(c, Request{Path: source, Options: o}); err != nil {
		return Result{}, failed(errors.Join(errLost, err))
	}
	// The name is the one that was typed: a guest does not choose what a file of the host is called.
	r, err := receive(frame.NewReader(c), target, filepath.Base(source), o, false)
	if err != nil && ctx.Err() != nil {
		err = errors.Join(ctx.Err(), err)
	}
	return r, failed(err)
}

func request(w io.Writer, r Request) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return frame.NewWriter(w).Write(kindRequest, b)
}

// Serve is the guest's end of one stream, after its "ok". local says where a path of a request is on
// this machine. It returns when the host has closed its end, or after a bound.
func Serve(conn Conn, local func(path string) string) error {
	c := patient{conn}
	r := frame.NewReader(c)
	kind, payload, err := r.Next()
	if err != nil {
		return err
	}
	var q Request
	if kind != kindRequest || json.Unmarshal(payload, &q) != nil || q.Path == "" || strings.ContainsRune(q.Path+q.Name, 0) ||
		q.Put && (q.Name == "" || strings.Contains(q.Name, "/")) {
		return fmt.Errorf("%w: no request", errForm)
	}
	var result Result
	if q.Put {
		result, err = receive(r, local(q.Path), q.Name, q.Options, true)
	} else {
		var from *source
		if from, err = openSource(local(q.Path)); err == nil {
			defer from.f.Close()
			return send(c, from, nil) // the host closes when it has everything
		}
	}
	if errors.Is(err, errLost) {
		return err
	}
	if err != nil {
		result.Failed = err.Error()
	}
	return frame.NewWriter(c).Write(kindResult, result.encode())
}
