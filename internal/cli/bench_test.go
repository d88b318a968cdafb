package cli

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestSpread(t *testing.T) {
	hundred := make([]float64, 100)
	for i := range hundred {
		hundred[i] = float64(100 - i)
	}
	for _, tt := range []struct {
		values []float64
		want   spread
	}{
		{nil, spread{}},
		{[]float64{7}, spread{7, 7, 7, 7, 7, 7, 7}},
		{[]float64{3, 1, 2}, spread{1, 2, 3, 3, 3, 3, 2}},
		{hundred, spread{1, 50, 90, 95, 99, 100, 50.5}},
	} {
		if diff := cmp.Diff(tt.want, spreadOf(tt.values)); diff != "" {
			t.Error(diff)
		}
	}
}
