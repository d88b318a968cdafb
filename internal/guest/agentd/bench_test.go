package agentd_test

import (
	"testing"

	agentv1 "git.thaloco.com/thaloco/banger/api/banger/agent/v1"
	"git.thaloco.com/thaloco/banger/internal/guest/agent"
	"git.thaloco.com/thaloco/banger/internal/guest/agentd"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

// BenchmarkHealth is a call over a session that is open, as the daemon makes it: what both ends cost, without a guest in
// between.
func BenchmarkHealth(b *testing.B) {
	g := &agentd.Guest{Version: "v1", Stages: &agentd.Stages{}}
	for name, link := range map[string]vmm.Link{"vsock": streamLink(b, g), "port": newPort(b, g).link()} {
		b.Run(name, func(b *testing.B) {
			c := open(b, link).Client()
			for b.Loop() {
				if _, err := c.Health(b.Context(), &agentv1.HealthRequest{}); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(name+", with a session of its own", func(b *testing.B) {
			for b.Loop() {
				s, err := agent.Open(b.Context(), link, secret)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := s.Client().Health(b.Context(), &agentv1.HealthRequest{}); err != nil {
					b.Fatal(err)
				}
				if err := s.Close(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
