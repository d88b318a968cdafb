package fault

import (
	"context"
	"errors"
	"fmt"
	"testing"
)

func TestCodeOf(t *testing.T) {
	inner := New(NotFound, "calm-otter", "there is no such VM")
	for _, c := range []struct {
		err  error
		want Code
	}{
		{nil, ""},
		{inner, NotFound},
		{fmt.Errorf("looking: %w", inner), NotFound},
		{Wrap(inner, Timeout, "x", "outer"), Timeout}, // the outermost wins
		{errors.Join(errors.New("other"), inner), NotFound},
		{context.Canceled, Cancelled},
		{fmt.Errorf("waiting: %w", context.DeadlineExceeded), Timeout},
		{errors.New("anything"), Internal},
	} {
		if got := CodeOf(c.err); got != c.want {
			t.Errorf("%v: %s, want %s", c.err, got, c.want)
		}
	}
	if Is(nil, "") {
		t.Error("no error has no code")
	}
}

func TestHintOf(t *testing.T) {
	hinted := New(NotFound, "a", "b").WithHint("type %s", "this")
	for _, c := range []struct {
		err  error
		want string
	}{
		{nil, ""},
		{errors.New("x"), ""},
		{hinted, "type this"},
		{Wrap(hinted, Internal, "", "outer"), "type this"},
		{Wrap(hinted, Internal, "", "outer").WithHint("nearer"), "nearer"},
		{errors.Join(errors.New("x"), fmt.Errorf("y: %w", hinted)), "type this"},
	} {
		if got := HintOf(c.err); got != c.want {
			t.Errorf("%v: %q, want %q", c.err, got, c.want)
		}
	}
}

func TestErrorText(t *testing.T) {
	for want, err := range map[string]error{
		"calm-otter: no such VM":          New(NotFound, "calm-otter", "no such VM"),
		"calm-otter: cannot start: busy":  Wrap(errors.New("busy"), Internal, "calm-otter", "cannot start"),
		"internal":                        &Error{Code: Internal},
		"wrapped: calm-otter: no such VM": fmt.Errorf("wrapped: %w", New(NotFound, "calm-otter", "no such VM")),
	} {
		if err.Error() != want {
			t.Errorf("%q, want %q", err, want)
		}
	}
	if cause := errors.New("why"); !errors.Is(Wrap(cause, Internal, "", ""), cause) {
		t.Error("the cause is lost")
	}
}
