package main

import (
	"context"

	"git.thaloco.com/thaloco/banger/internal/doctor"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/helper/wire"
	"git.thaloco.com/thaloco/banger/internal/sandbox"
)

// rootHelper is what the daemon has of the root helper. Of the zero value it has none, and needs none.
type rootHelper struct {
	socket string // "" for a daemon that is root
	err    error  // why it cannot be used
}

// findHelper looks for the helper of a user.
func findHelper(ctx context.Context, uid int) rootHelper {
	if uid == 0 {
		return rootHelper{}
	}
	h := rootHelper{socket: wire.Socket(uid)}
	_, h.err = wire.Probe(ctx, h.socket)
	return h
}

// usable says whether it serves this daemon.
func (h rootHelper) usable() bool { return h.socket != "" && h.err == nil }

// installed says whether there is one, fit or not.
func (h rootHelper) installed() bool { return h.socket != "" && !fault.Is(h.err, fault.Unavailable) }

// finding is what doctor says of it. To be without one is no failure: there is a network that takes none.
func (h rootHelper) finding(ctx context.Context) doctor.Finding {
	const code, title = "helper", "Root helper"
	a, err := wire.Probe(ctx, h.socket)
	switch {
	case fault.Is(err, fault.VersionSkew):
		return doctor.FromError(code, title, err, doctor.ShowLog)
	case err != nil:
		return doctor.Finding{Code: code, Severity: doctor.Warn, Title: title, Detail: "none, so VMs are not on a bridge of the host: " + err.Error(), Fix: doctor.FixOf(err, doctor.ShowLog)}
	case !h.usable():
		return doctor.Finding{Code: code, Severity: doctor.Warn, Title: title, Detail: "it was installed after the daemon started, which does without", Fix: "banger daemon stop"}
	}
	return doctor.Finding{Code: code, Severity: doctor.Pass, Title: title, Detail: a.Release}
}

// advise has the check of the network that VMs are put on tell of the helper, where one would be of use.
func (h rootHelper) advise(n sandbox.Network) sandbox.Network {
	if h.socket == "" {
		return n
	}
	a := advised{n, h}
	if p, ok := n.(sandbox.Publisher); ok {
		return struct {
			advised
			sandbox.Publisher
		}{a, p}
	}
	return a
}

// advised is a network whose check also tells of the helper.
type advised struct {
	sandbox.Network
	helper rootHelper
}

// Check is the network's, and what there is to say of the helper.
func (a advised) Check(ctx context.Context) []doctor.Finding {
	return append(a.Network.Check(ctx), a.helper.finding(ctx))
}
