package doctor

import (
	"context"
	"errors"
	"strings"
	"testing"
)

func TestRun(t *testing.T) {
	broken, calls := true, 0
	mended := func(context.Context) []Finding {
		if !broken {
			return []Finding{{Code: "a", Severity: Pass}}
		}
		return []Finding{{Code: "a", Severity: Warn, Repair: func(context.Context) error { calls++; broken = false; return nil }}}
	}
	stubborn := func(context.Context) []Finding {
		return []Finding{{Code: "b", Severity: Fail, Detail: "bad", Repair: func(context.Context) error { return errors.New("no way") }}, {Code: "c", Severity: Pass}}
	}
	looks := 0
	fine := func(context.Context) []Finding { looks++; return []Finding{{Code: "d", Severity: Warn}} }
	checks := []Check{mended, stubborn, fine}
	if got := Run(t.Context(), checks, false); len(got) != 4 || calls != 0 || got[0].Severity != Warn || got[0].Fixed {
		t.Errorf("without fix: %+v, %d repairs", got, calls)
	}
	looks = 0
	got := Run(t.Context(), checks, true)
	if calls != 1 || got[0].Severity != Pass || !got[0].Fixed {
		t.Errorf("repaired: %+v, %d repairs", got[0], calls)
	}
	if got[1].Fixed || got[1].Severity != Fail || !strings.Contains(got[1].Detail, "no way") || got[2].Fixed {
		t.Errorf("not to be repaired: %+v", got[1:3])
	}
	if looks != 1 {
		t.Errorf("what has nothing to repair was looked at %d times", looks)
	}
	if got := Run(t.Context(), checks, true); got[0].Fixed {
		t.Errorf("nothing was repaired this time: %+v", got[0])
	}
}
