# Of the events of `go test -json` (jq -rs): the top-level tests that failed since the lab's host did, a name a line. It is an error
# if a test failed that does not say so, or none did: that is a verdict, and no second try may hide it.
[.[] | select(.Test != null)] | group_by(.Test)
| map(select(any(.[]; .Action == "fail")) | {test: .[0].Test, said: ([.[] | select(.Action == "output") | .Output] | join(""))})
| map(.test) as $failed
| map(select(.test as $t | $failed | any(startswith($t + "/")) | not)) # of a test with tests of its own those count
| if length == 0 then error("no test failed") else . end
| map(if .said | contains("this is no verdict about banger") then .test | split("/")[0] else error(.test + " failed") end)
| unique | .[]
