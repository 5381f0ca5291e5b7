-- Accept a request, or (with `refusal`) record it as ended by one. Returns {1, place} or {0, reason}.
-- ARGV: id, user, target, priority, kind, session, object, object size, quota, retention_ms, declared_ms, refusal, record, payload,
-- id of the ended request that this one repeats or ''
local id, user, target, priority, kind = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local session, object, quota, retention = ARGV[6], ARGV[7], tonumber(ARGV[8]), tonumber(ARGV[9])
local declared, refusal, record, payload = tonumber(ARGV[10]), ARGV[11], ARGV[12], ARGV[13]
local repeats = ARGV[14]
local now = now_ms()

if redis.call('EXISTS', k_request(id)) == 1 then return {1, -1} end  -- the same submission, sent twice
if refusal == '' and redis.call('ZCARD', k_open(user)) >= quota then return {0, 'quota'} end

local bell = id
if session ~= '' and redis.call('GET', k_session(session)) == user then bell = id .. ' ' .. session end

redis.call('HSET', k_request(id), 'user', user, 'target', target, 'priority', priority, 'kind', kind,
  'object', object, 'record', record, 'submitted', now, 'state', 'waiting', 'declared', declared,
  'attempt', 0, 'losses', 0, 'releases', 0, 'token', '', 'session', session)
if repeats ~= '' then
  redis.call('HSET', k_request(id), 'repeats', repeats)
  if redis.call('EXISTS', k_request(repeats)) == 1 then redis.call('HSET', k_request(repeats), 'repeated_by', id) end
end
redis.call('ZADD', k_user(user), now, id)
redis.call('PERSIST', k_user(user))
bump('requests_received')

if refusal ~= '' then
  emit(id, now, 'RECEIVED', '', '', '', bell)
  settle(id, now, 'ERROR', refusal, '', '', retention)
  return {1, 0}
end

redis.call('ZADD', k_open(user), now, id)
if object == '' then redis.call('SET', k_payload(id), payload) end

local ahead = tonumber(redis.call('ZSCORE', TARGETS, target) or '0')
local busy = redis.call('ZCARD', k_running(target))
local expected = estimate(target, kind, declared)
local text = 'Place ' .. (ahead + 1) .. ' in the queue.'
if ahead + busy > 0 and expected > 0 then
  text = text .. ' Expected to start in about ' .. math.ceil((ahead + busy) * expected / 1000) .. ' s.'
end
emit(id, now, 'QUEUED', text, '', '', bell)
enqueue(id, target, priority, user, now, false)
return {1, ahead}
