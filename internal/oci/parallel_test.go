package oci

import (
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestLayersComeAtOnce: of one image as many layers are asked for at once as docs/pull.md says, and no more. The registry answers none
// before that many were asked for.
func TestLayersComeAtOnce(t *testing.T) {
	const four = 4
	h, p := newHub(t), newPuller(t)
	image := manyLayers(t, four+2)
	layers, err := image.Layers()
	if err != nil {
		t.Fatal(err)
	}
	ref := h.push(t, "x:1", image)
	var mu sync.Mutex
	waiting, most, asked := 0, 0, map[string]bool{}
	enough := make(chan struct{})
	h.front = func(w http.ResponseWriter, r *http.Request, inner http.Handler) {
		for _, l := range layers {
			digest, err := l.Digest()
			if err != nil || !strings.HasSuffix(r.URL.Path, "/"+digest.String()) {
				continue
			}
			mu.Lock()
			waiting++
			most = max(most, waiting)
			asked[digest.String()] = true
			if waiting == four && len(asked) == four {
				time.AfterFunc(50*time.Millisecond, func() { close(enough) }) // a fifth would come meanwhile
			}
			mu.Unlock()
			select {
			case <-enough:
			case <-time.After(2 * time.Second):
				t.Errorf("%s is waited for alone: %d layers were asked for", digest, len(asked))
			}
			mu.Lock()
			waiting-- // before the answer: the next one is asked for as soon as that is read
			mu.Unlock()
		}
		ranged(w, r, inner)
	}
	img := pull(t, p, ref)
	if most != four || len(asked) != four+2 || len(img.layers) != four+2 {
		t.Errorf("of %d layers %d were asked for, at most %d at once, want %d", len(img.layers), len(asked), most, four)
	}
}
